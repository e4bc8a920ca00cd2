//! What can go wrong, in the words of `fastq.errors`: one kind for each class there.

use std::fmt;

use tokio_postgres::error::{DbError, SqlState};

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Which class of `fastq.errors` an error becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A setting is wrong: which, what it was, what it must be.
    Settings,
    /// Not migrated, too old, or newer and shut to this version.
    Schema,
    /// The server refused a statement.
    Database {
        /// The five characters of SQLSTATE.
        sqlstate: String,
        /// The same statement may succeed later.
        transient: bool,
    },
    /// The connection broke, could not be made, or went silent.
    ConnectionLost {
        /// A commit was sent and its answer never came.
        in_doubt: bool,
    },
    /// A task can't be enqueued.
    Enqueue,
    /// A payload can't be encoded, or is over the limit.
    Payload,
    /// A task's token is held, and the task said that this is an error.
    Duplicate {
        /// Who holds it; None: an earlier task of the same call.
        existing: Option<i64>,
    },
    /// A consumer was used wrongly, or a part of it died.
    Consumer,
}

/// An error with a message for people; it never holds a password or a payload.
#[derive(Debug, Clone)]
pub struct Error {
    /// Which class it becomes.
    pub kind: Kind,
    /// What was tried, with what, and what to do.
    pub message: String,
    /// The index of the task that is to blame, in an `enqueue_many`.
    pub index: Option<u64>,
    /// How many tasks of an `enqueue_many` with `commit_every` are in.
    pub committed: Option<u64>,
    /// With what SQLSTATE the server ended the connection, or denied one.
    pub closing: Option<String>,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), index: None, committed: None, closing: None }
    }

    /// A wrong setting.
    pub fn settings(message: impl Into<String>) -> Self {
        Self::new(Kind::Settings, message)
    }

    /// A lost connection whose last commit is not in doubt.
    pub fn lost(message: impl Into<String>) -> Self {
        Self::new(Kind::ConnectionLost { in_doubt: false }, message)
    }

    /// A task whose token is held.
    pub fn duplicate(existing: Option<i64>) -> Self {
        let message = match existing {
            Some(id) => format!("task {id} has this idempotency token (on_conflict is \"raise\")"),
            None => "an earlier task of the call has this idempotency token (on_conflict is \"raise\")".to_owned(),
        };
        Self::new(Kind::Duplicate { existing }, message)
    }

    /// Names the task that is to blame.
    #[must_use]
    pub fn at(mut self, index: u64) -> Self {
        self.index = Some(index);
        self
    }

    /// Whether the connection is gone, so that a new one may do better.
    pub fn is_lost(&self) -> bool {
        matches!(self.kind, Kind::ConnectionLost { .. })
    }

    /// Whether the server refused the statement for what is in it, not for the state it is in: a smaller statement may pass. A row or an
    /// index entry that is corrupt (XX001, XX002) is found so, too.
    pub fn is_data_fault(&self) -> bool {
        let Some(code) = self.sqlstate() else { return false };
        matches!(&code[..code.len().min(2)], "21" | "22" | "23" | "P0" | "54") || matches!(code, "XX001" | "XX002")
    }

    /// Whether the server answered that it only reads at present: what was sent to it was not done.
    pub fn is_read_only(&self) -> bool {
        self.closing.as_deref() == Some("25006")
    }

    /// What kind of trouble it is, for whoever says each kind once: a refusal by its SQLSTATE; all ways in which a server can be away
    /// are one.
    pub fn trouble(&self) -> &str {
        match &self.kind {
            Kind::Database { sqlstate, .. } if !sqlstate.is_empty() => sqlstate,
            Kind::ConnectionLost { .. } => match self.closing.as_deref() {
                Some("57P01" | "57P02" | "57P03") | None => "",
                Some(code) => code,
            },
            _ => &self.message,
        }
    }

    /// The server's SQLSTATE, where it answered.
    pub fn sqlstate(&self) -> Option<&str> {
        match &self.kind {
            Kind::Database { sqlstate, .. } => Some(sqlstate),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// A FATAL error, an administrator's shutdown or a server in start-up or recovery ends or denies the connection.
fn ends_connection(e: &DbError) -> bool {
    let class = e.code().code().get(..2).unwrap_or("");
    matches!(e.severity(), "FATAL" | "PANIC")
        || class == "08"
        || matches!(e.code().code(), "57P01" | "57P02" | "57P03" | "25006")
}

/// Deadlocks, serialization failures, full disks and the like pass; a constraint or a syntax error does not.
fn is_transient(code: &SqlState) -> bool {
    matches!(code.code().get(..2).unwrap_or(""), "08" | "40" | "53" | "55" | "57" | "58")
}

impl From<tokio_postgres::Error> for Error {
    fn from(e: tokio_postgres::Error) -> Self {
        if let Some(db) = e.as_db_error() {
            let detail = db.hint().map(|h| format!(" ({h})")).unwrap_or_default();
            if ends_connection(db) {
                let message =
                    format!("PostgreSQL ended the connection: {} [{}]{detail}", db.message(), db.code().code());
                return Self { closing: Some(db.code().code().to_owned()), ..Self::lost(message) };
            }
            let kind = Kind::Database { sqlstate: db.code().code().to_owned(), transient: is_transient(db.code()) };
            return Self::new(kind, format!("{} [{}]{detail}", db.message(), db.code().code()));
        }
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        if e.is_closed() {
            return Self::lost("the connection to PostgreSQL is closed");
        }
        let text = e.to_string();
        if text.starts_with("error communicating")
            || text.starts_with("error connecting")
            || text.starts_with("unexpected message")
        {
            return Self::lost(format!("{text}{cause}"));
        }
        Self::new(Kind::Database { sqlstate: String::new(), transient: false }, format!("{text}{cause}"))
    }
}
