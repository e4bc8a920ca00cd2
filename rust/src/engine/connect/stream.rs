//! The bytes' way to the server: a TCP or Unix socket, TLS on top of it or not, and a gate at which the server's demand for a
//! password is looked at before anything is answered (`require_auth`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_rustls::client;

use crate::engine::connect::options::cannot;
use crate::engine::error::{Error, Result};

/// How a TCP connection is watched. None: the system's default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tcp {
    pub(super) keepalives: bool,
    pub(super) idle: Option<Duration>,
    pub(super) interval: Option<Duration>,
    pub(super) count: Option<u32>,
    pub user_timeout: Option<Duration>,
}

impl Tcp {
    /// Sets it up.
    pub(super) fn apply(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        if self.keepalives {
            let mut watch = TcpKeepalive::new();
            if let Some(idle) = self.idle {
                watch = watch.with_time(idle);
            }
            if let Some(interval) = self.interval {
                watch = watch.with_interval(interval);
            }
            if let Some(count) = self.count {
                watch = watch.with_retries(count);
            }
            socket.set_tcp_keepalive(&watch)?;
        }
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(self.user_timeout)?;
        Ok(())
    }
}

/// Ways to log in, by their names in `require_auth`.
const METHODS: [&str; 6] = ["password", "md5", "gss", "sspi", "scram-sha-256", "none"];
const OAUTH: &str = "oauth";

/// Those of `METHODS` that are let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Methods([bool; METHODS.len()]);

impl Methods {
    /// Reads `require_auth`: a list of what is let pass, or, with a `!` before each, of what is not.
    pub(super) fn read(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split(',').map(str::trim_ascii).collect();
        let negative = parts.iter().filter(|part| part.starts_with('!')).count();
        if negative != 0 && negative != parts.len() {
            return Err(cannot("require_auth", "either all of its methods have a \"!\" or none"));
        }
        let mut seen = [false; METHODS.len()];
        let mut has_oauth = false;
        for part in &parts {
            let name = part.strip_prefix('!').unwrap_or(part);
            let entry = match METHODS.iter().position(|method| *method == name) {
                Some(at) => &mut seen[at],
                None if name == OAUTH => &mut has_oauth,
                None => {
                    let names = METHODS.join(", ");
                    return Err(cannot("require_auth", &format!("its methods must be of {names}")));
                }
            };
            if std::mem::replace(entry, true) {
                return Err(cannot("require_auth", "it has a method twice"));
            }
        }
        let allowed = Self(seen.map(|is_in| is_in != (negative > 0)));
        // GSSAPI, SSPI and OAuth are not spoken here.
        if ["password", "md5", "scram-sha-256", "none"].iter().any(|method| allowed.lets(method)) {
            Ok(allowed)
        } else {
            Err(cannot("require_auth", "fastq logs in by password, md5, scram-sha-256 or a certificate alone (none)"))
        }
    }

    fn lets(self, method: &str) -> bool {
        METHODS.iter().zip(self.0).any(|(name, is_in)| is_in && *name == method)
    }
}

/// Looks at the server's first messages until it has said how to log in.
#[derive(Debug)]
pub(super) struct Gate {
    methods: Methods,
    head: Vec<u8>,
}

impl Gate {
    pub(super) fn new(methods: Methods) -> Self {
        Self { methods, head: Vec::new() }
    }

    /// Takes in what was read; true: the gate has done its work.
    fn see(&mut self, bytes: &[u8]) -> io::Result<bool> {
        self.head.extend_from_slice(bytes);
        // Type, length, and the number that says what an authentication message asks for. Whatever else comes first ends the attempt.
        let Some((&kind, rest)) = self.head.split_first() else { return Ok(false) };
        if kind != b'R' {
            return Ok(true);
        }
        let Some(code) = rest.get(4..8).and_then(|code| code.try_into().ok()).map(u32::from_be_bytes) else {
            return Ok(false);
        };
        let asked = match code {
            0 => "none",
            3 => "password",
            5 => "md5",
            7 | 8 => "gss",
            9 => "sspi",
            10 => "scram-sha-256",
            _ => "something else",
        };
        if self.methods.lets(asked) {
            return Ok(true);
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the server asks for the method {asked:?}, which require_auth does not let pass"),
        ))
    }
}

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<client::TlsStream<TcpStream>>),
}

/// A connection's stream.
#[derive(Debug)]
pub(super) struct Wire {
    io: Io,
    gate: Option<Gate>,
    /// The hash of the server's certificate that SCRAM binds to.
    end_point: Option<Vec<u8>>,
}

impl Wire {
    pub(super) fn tcp(stream: TcpStream, gate: Option<Gate>) -> Self {
        Self { io: Io::Tcp(stream), gate, end_point: None }
    }

    pub(super) fn unix(stream: UnixStream, gate: Option<Gate>) -> Self {
        Self { io: Io::Unix(stream), gate, end_point: None }
    }

    pub(super) fn tls(stream: client::TlsStream<TcpStream>, gate: Option<Gate>, end_point: Option<Vec<u8>>) -> Self {
        Self { io: Io::Tls(Box::new(stream)), gate, end_point }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = match &mut this.io {
            Io::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if let Some(gate) = &mut this.gate {
            ready!(polled)?;
            if gate.see(&buf.filled()[before..])? {
                this.gate = None;
            }
            return Poll::Ready(Ok(()));
        }
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Io::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl TlsStream for Wire {
    fn channel_binding(&self) -> ChannelBinding {
        self.end_point.clone().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

/// What tokio-postgres calls to encrypt a stream: here that is done already, as there are ways to it that it doesn't know.
#[derive(Debug)]
pub(super) struct Done;

impl TlsConnect<Wire> for Done {
    type Stream = Wire;
    type Error = Error;
    type Future = std::future::Ready<Result<Wire>>;

    fn connect(self, wire: Wire) -> Self::Future {
        std::future::ready(Ok(wire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(code: u32) -> Vec<u8> {
        let mut bytes = vec![b'R', 0, 0, 0, 8];
        bytes.extend(code.to_be_bytes());
        bytes
    }

    #[test]
    fn the_gate_stops_a_weak_method_in_whatever_pieces_it_comes() {
        let mut gate = Gate::new(Methods::read("scram-sha-256").expect("read"));
        let bytes = asks(3);
        let seen: Vec<_> = bytes.chunks(1).map(|chunk| gate.see(chunk)).collect();
        let (last, before) = seen.split_last().expect("some");
        assert!(before.iter().all(|step| matches!(step, Ok(false))), "{before:?}");
        assert!(last.as_ref().is_err_and(|e| e.to_string().contains("password")), "{last:?}");
    }

    #[test]
    fn the_gate_opens_once() {
        for (text, code) in [("scram-sha-256", 10), ("!password,!md5", 10), ("none", 0), ("md5, password", 5)] {
            let mut gate = Gate::new(Methods::read(text).expect("read"));
            assert!(gate.see(&asks(code)).expect("let pass"), "{text}");
        }
        // An error message is for the one who reads on.
        assert!(Gate::new(Methods::read("none").expect("read")).see(b"E").expect("let pass"));
    }
}
