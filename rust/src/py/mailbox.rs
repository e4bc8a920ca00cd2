//! Waking an event loop: one byte on a socket that the loop reads.

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use pyo3::prelude::*;

use crate::engine::consume::Waker;

/// Writes a byte to a duplicate of socket `fd`. A full socket is as good as a byte more: the loop will read it anyway.
#[allow(unsafe_code, reason = "Python gives the socket as a number; there is no safe way to take it")]
pub(crate) fn waker(fd: i32) -> PyResult<Waker> {
    if fd < 0 {
        return Err(pyo3::exceptions::PyValueError::new_err("a socket's number is not negative"));
    }
    // SAFETY: fd is not negative, and the caller keeps its socket open during this call, in which it is duplicated.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let stream = UnixStream::from(borrowed.try_clone_to_owned()?);
    stream.set_nonblocking(true)?;
    Ok(Box::new(move || drop((&stream).write(&[0]))))
}
