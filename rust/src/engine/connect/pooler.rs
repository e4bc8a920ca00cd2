//! A pooler in between, such as `PgBouncer`: the server's session may be another one in each transaction, so nothing is left in it. No
//! setting, no named statement, no LISTEN; what every statement needs is said anew in its transaction, in the same flight.
//!
//! A pooler is known by its numbers: it answers the login with a process number of its own making, while `pg_backend_pid()` tells the
//! server's. Where they are the same, nothing stands in between that hands out sessions (a proxy that passes bytes on may).

use std::fmt::Write;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Client;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use crate::engine::error::{Error, Result};

/// Plans: generic, and never by reading a whole table. docs/adr/0001-storage.md has what happened without.
const SETTINGS: [(&str, &str); 7] = [
    ("enable_seqscan", "off"),
    ("plan_cache_mode", "force_generic_plan"),
    ("jit", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("client_min_messages", "warning"),
];
/// A pooled transaction says these with its BEGIN.
const OF_SESSION: [(&str, &str); 2] =
    [("default_transaction_isolation", "read committed"), ("default_transaction_read_only", "off")];
/// A cancel request: length, code, process number, key.
const REQUEST: usize = 16;

/// `SELECT set_config(…), …` for a session, or for the transaction that is open. What may be lost in a crash is done again (claims,
/// heartbeats, upkeep); but a role or database whose default is `off` would make an acknowledged enqueue a lie: stronger settings stay.
fn settings(durable: bool, is_local: bool) -> String {
    let mut text = "SELECT".to_owned();
    let more: &[_] = if is_local { &[] } else { &OF_SESSION };
    for (name, value) in SETTINGS.iter().chain(more) {
        write!(text, " set_config('{name}', '{value}', {is_local}),").expect("a String takes all");
    }
    let commit = if durable {
        format!(
            "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', {is_local}) END"
        )
    } else {
        format!("set_config('synchronous_commit', 'off', {is_local})")
    };
    text + " " + &commit
}

/// Settings for the whole session, made only if no pooler hands it out: then it answers one row, else none.
pub(super) async fn first_statement(client: &Client, durable: bool) -> String {
    let pid = process_number(client).await;
    format!("{} WHERE pg_catalog.pg_backend_pid() = {pid}", settings(durable, false))
}

/// The process number that the login was answered with; 0: none. The client tells it only to who asks for an end of its statement.
async fn process_number(client: &Client) -> i32 {
    let mut request = Vec::with_capacity(REQUEST);
    let asked = client.cancel_token().cancel_query_raw(Noted(&mut request), AsItIs).await;
    let number = request.get(8..12).and_then(|bytes| bytes.try_into().ok());
    if asked.is_ok() && request.len() == REQUEST { number.map_or(0, i32::from_be_bytes) } else { 0 }
}

/// Of a connection through a pooler.
#[derive(Debug)]
pub(super) struct Pooled {
    settings: String,
    /// A transaction is open, or on its way.
    is_open: AtomicBool,
}

impl Pooled {
    pub(super) fn new(durable: bool) -> Self {
        Self { settings: settings(durable, true), is_open: AtomicBool::new(false) }
    }

    /// Whether statements sent now run in a transaction that was begun before.
    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Opens a transaction around one statement; its end is sent with it.
    pub(super) fn begin(&self) -> String {
        format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}", self.settings)
    }

    /// Plain text as it is to be sent: a BEGIN with the settings, ahead of what else it says. Takes note of what it opens and ends.
    pub(super) fn note(&self, text: &str) -> String {
        if text.starts_with("BEGIN") {
            self.is_open.store(true, Ordering::Relaxed);
            let rest = text.split_once(';').map_or("", |(_, rest)| rest);
            return format!("{};{rest}", self.begin());
        }
        if matches!(text, "COMMIT" | "ROLLBACK") {
            self.is_open.store(false, Ordering::Relaxed);
        }
        text.to_owned()
    }
}

/// A server in recovery refuses READ WRITE, before any statement could be refused as elsewhere.
pub(super) fn begun(result: Result<()>) -> Result<()> {
    result.map_err(|e| match e.sqlstate() {
        Some("0A000") => Error { closing: Some("25006".to_owned()), ..Error::lost(e.message) },
        _ => e,
    })
}

/// Takes down what is written to it.
struct Noted<'a>(&'a mut Vec<u8>);

impl AsyncRead for Noted<'_> {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Noted<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl TlsStream for Noted<'_> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// The client of an encrypted session encrypts a request, too; this one goes nowhere.
struct AsItIs;

impl<'a> TlsConnect<Noted<'a>> for AsItIs {
    type Stream = Noted<'a>;
    type Error = Error;
    type Future = std::future::Ready<Result<Noted<'a>>>;

    fn connect(self, stream: Noted<'a>) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_begin_is_told_all_settings_before_what_else_it_says() {
        let pooled = Pooled::new(true);
        let text = pooled.note("BEGIN; SET LOCAL lock_timeout = 7");
        assert!(pooled.is_open());
        let (ours, theirs) = (text.find("'lock_timeout', '0', true"), text.find("; SET LOCAL lock_timeout = 7"));
        assert!(ours.is_some() && ours < theirs, "{text}");
        assert_eq!(pooled.note("ROLLBACK"), "ROLLBACK");
        assert!(!pooled.is_open());
        assert!(pooled.note("BEGIN").starts_with("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT set_config"));
    }

    #[test]
    fn commits_wait_for_the_log_only_where_they_must() {
        assert!(settings(false, true).ends_with("set_config('synchronous_commit', 'off', true)"));
        assert!(settings(true, false).contains("WHEN current_setting('synchronous_commit') = 'off'"));
    }
}
