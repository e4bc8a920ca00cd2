//! Connections: what a connection string means, how a connection is made of it, and what every session is told first.
//!
//! [`words`] takes the string apart, [`sources`] adds the service file and the environment, [`options`] says what it all means. [`dial`]
//! tries hosts and addresses in turn ([`hosts`], [`stream`], [`tls`], [`verify`], [`passfile`]), [`fault`] words what went wrong. A
//! [`Link`] is what the rest of the engine holds, whether a [`pooler`] stands in between or not.

mod backoff;
mod dial;
mod fault;
mod hosts;
mod link;
mod options;
mod passfile;
mod pooler;
mod sources;
mod stream;
mod tls;
mod verify;
mod words;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

pub use backoff::{Backoff, random_f64, random_u64};
pub use link::{Link, Params};
pub use words::{Given, Words, parse};

use parking_lot::Mutex;
use tokio_postgres::types::Type;

use crate::engine::error::{Error, Result};
use crate::engine::sql::Statements;
use hosts::Host;
use options::Options;
use tls::Mode;

/// The types of statements' parameters, by the statement's name.
type Types = HashMap<&'static str, Arc<[Type]>>;

/// Where to connect, and how long anything may take.
#[derive(Debug, Clone)]
pub struct Target {
    options: Arc<Options>,
    is_ambiguous: bool,
    /// Limit for making a connection, whatever is tried for it.
    pub connect_timeout: Duration,
    /// Limit for one statement's answer; beyond it the connection counts as lost.
    pub statement_timeout: Duration,
    /// The statements, rendered for the schema.
    pub statements: Arc<Statements>,
    /// Statements sent on its connections; given the same one, several targets count together.
    pub sent: Arc<AtomicU64>,
    /// Types of the statements' parameters, as far as connections through a pooler asked for them.
    types: Arc<Mutex<Types>>,
}

impl Target {
    /// Reads a connection string as libpq does, with the service file and the environment. What the string names is looked at now, and
    /// read again for each connection.
    pub fn new(
        dsn: &str,
        schema: &str,
        part: &str,
        connect_timeout: Duration,
        statement_timeout: Duration,
    ) -> Result<Self> {
        let given = parse(dsn)?;
        let words = complete(&given.words)?;
        let mut options = read(&words, statement_timeout)?;
        options.application_name.get_or_insert_with(|| format!("fastq {part}"));
        Ok(Self {
            options: Arc::new(options),
            is_ambiguous: given.is_ambiguous,
            connect_timeout,
            statement_timeout,
            statements: Arc::new(Statements::new(schema)?),
            sent: Arc::default(),
            types: Arc::default(),
        })
    }

    /// `host:port` of all hosts and the database, for messages.
    pub fn place(&self) -> String {
        if self.is_ambiguous { "the database".to_owned() } else { self.options.place() }
    }

    /// Makes a connection. `durable`: its commits wait for the log.
    pub async fn connect(&self, durable: bool) -> Result<Link> {
        self.connect_by(durable, Instant::now() + self.connect_timeout).await
    }

    /// As `connect`, but gives up at `deadline` if that is sooner.
    pub async fn connect_by(&self, durable: bool, deadline: Instant) -> Result<Link> {
        let deadline = deadline.min(Instant::now() + self.connect_timeout);
        let making = async {
            let session = dial::dial(&self.options, deadline).await?;
            Link::open(session, self.clone(), durable, deadline).await
        };
        making.await.map_err(|e| if self.is_ambiguous { unquotable(&e) } else { e })
    }
}

/// The words of a string with what the service file and the environment add.
pub fn complete(given: &Words) -> Result<Words> {
    sources::complete(given, &sources::process_env)
}

/// Words by their own names.
pub fn known(words: impl IntoIterator<Item = (String, String)>) -> Result<Words> {
    let find = |(word, value): (String, String)| {
        words::find(&word).map(|word| (word, value)).ok_or_else(|| words::unknown(&word, true))
    };
    words.into_iter().map(find).collect()
}

/// Refuses words that can't be followed, and files that are missing or can't be used.
pub fn check(words: &Words) -> Result<()> {
    read(words, Duration::ZERO).map(drop)
}

fn read(words: &Words, silence: Duration) -> Result<Options> {
    let options = Options::read(words, silence, &sources::process_env)?;
    if options.tls.mode != Mode::Disable && options.hosts.iter().any(Host::is_remote) {
        options.tls.load()?;
    }
    Ok(options)
}

/// An error about a string whose password may have been taken for something else: nothing of it is repeated.
fn unquotable(e: &Error) -> Error {
    let code = e.sqlstate().filter(|code| !code.is_empty()).map(|code| format!(" [{code}]")).unwrap_or_default();
    let message = format!(
        "could not connect to the database{code}: the connection string can be read in more than one way; \
         write characters such as @ / ? # in a user's name or password as %40, %2F, %3F, %23"
    );
    Error { message, ..e.clone() }
}
