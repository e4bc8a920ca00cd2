//! A task's own timeout and retry policy, from Python and back.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

use crate::engine::run_options::{Retry, RunOptions};

fn class<'py>(
    py: Python<'py>,
    known: &'static PyOnceLock<Py<PyType>>,
    name: &str,
) -> PyResult<&'py Bound<'py, PyType>> {
    known.import(py, "fastq._backoff", name)
}

fn constant(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    class(py, &CLASS, "ConstantBackoff")
}

fn exponential(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    class(py, &CLASS, "ExponentialBackoff")
}

/// What `Task` was given, which checked it then; `None`: neither. The error is what is wrong with what was put in its place since.
pub(crate) fn read(timeout: &Bound<'_, PyAny>, retry: &Bound<'_, PyAny>) -> Result<Option<RunOptions>, String> {
    if timeout.is_none() && retry.is_none() {
        return Ok(None);
    }
    let name =
        |value: &Bound<'_, PyAny>| value.get_type().name().map_or_else(|_| "this".into(), |name| name.to_string());
    let seconds =
        timeout.extract().map_err(|_| format!("timeout must be a number of seconds, not {}", name(timeout)))?;
    let policy = read_retry(retry).map_err(|e| e.to_string())?;
    if policy.is_none() && !retry.is_none() {
        return Err(format!("retry must be an ExponentialBackoff or a ConstantBackoff, not {}", name(retry)));
    }
    let options = RunOptions { timeout: seconds, retry: policy };
    options.check()?;
    Ok(Some(options))
}

fn read_retry(retry: &Bound<'_, PyAny>) -> PyResult<Option<Retry>> {
    let py = retry.py();
    if retry.is_none() {
        return Ok(None);
    }
    // No subclass: what it does otherwise could not be stored.
    if retry.get_type().is(constant(py)?) {
        return Ok(Some(Retry::Constant(retry.getattr(intern!(py, "seconds"))?.extract()?)));
    }
    if !retry.get_type().is(exponential(py)?) {
        return Ok(None);
    }
    Ok(Some(Retry::Exponential {
        exponent: retry.getattr(intern!(py, "exponent"))?.extract()?,
        jitter: retry.getattr(intern!(py, "jitter"))?.extract()?,
        maximum: retry.getattr(intern!(py, "maximum"))?.extract()?,
    }))
}

/// The policy as an object.
pub(crate) fn policy(py: Python<'_>, retry: Retry) -> PyResult<Bound<'_, PyAny>> {
    match retry {
        Retry::Constant(seconds) => constant(py)?.call1((seconds,)),
        Retry::Exponential { exponent, jitter, maximum } => {
            let words = PyDict::new(py);
            words.set_item(intern!(py, "exponent"), exponent)?;
            words.set_item(intern!(py, "jitter"), jitter)?;
            words.set_item(intern!(py, "maximum"), maximum)?;
            exponential(py)?.call((), Some(&words))
        }
    }
}
