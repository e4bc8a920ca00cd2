//! Connections: how they are made, what every session is told first, and the limit that every wait has.

use std::collections::HashMap;
use std::future::poll_fn;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Row, Statement};

use crate::engine::error::{Error, Kind, Result};
use crate::engine::sql::{MIGRATIONS, Statements};

/// Plans: generic, and never by reading a whole table. docs/adr/0001-storage.md has what happened without.
const SESSION: &str = "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan; SET jit = off; \
     SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
     SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET client_min_messages = warning; ";
/// What may be lost in a crash is done again: claims, heartbeats, upkeep.
const ASYNC_COMMIT: &str = "SET synchronous_commit = off";
/// A role or database whose default is `off` would make an acknowledged enqueue a lie; stronger settings stay.
const DURABLE_COMMIT: &str =
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";

/// Where to connect, and how long anything may take.
#[derive(Debug, Clone)]
pub struct Target {
    config: Config,
    /// Limit for making a connection.
    pub connect_timeout: Duration,
    /// Limit for one statement's answer; beyond it the connection counts as lost.
    pub statement_timeout: Duration,
    /// The statements, rendered for the schema.
    pub statements: Arc<Statements>,
}

impl Target {
    /// Reads a connection string (URI or keywords) as tokio-postgres does.
    pub fn new(
        dsn: &str,
        schema: &str,
        part: &str,
        connect_timeout: Duration,
        statement_timeout: Duration,
    ) -> Result<Self> {
        // tokio-postgres names the keyword that is wrong and never shows a value.
        let mut config = Config::from_str(dsn).map_err(|e| {
            let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            Error::settings(format!("the connection string can't be read: {cause}"))
        })?;
        if config.get_application_name().is_none() {
            config.application_name(format!("fastq {part}"));
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(connect_timeout);
        }
        // The default of two hours would leave a silent link unnoticed.
        if config.get_keepalives_idle() >= Duration::from_secs(7200) {
            config.keepalives_idle(Duration::from_secs(10));
            config.keepalives_interval(Duration::from_secs(5));
            config.keepalives_retries(3);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(statement_timeout);
        }
        let statements = Arc::new(Statements::new(schema)?);
        Ok(Self { config, connect_timeout, statement_timeout, statements })
    }

    /// `host:port` of the first host, for messages.
    pub fn place(&self) -> String {
        let host = self.config.get_hosts().first().map_or_else(String::new, |h| match h {
            tokio_postgres::config::Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            tokio_postgres::config::Host::Unix(path) => path.display().to_string(),
        });
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or("");
        format!("{host}:{port}/{database}")
    }

    /// Makes a connection. `durable`: its commits wait for the log.
    pub async fn connect(&self, durable: bool) -> Result<Link> {
        let place = self.place();
        let making = async {
            let (client, mut connection) = self.config.connect(NoTls).await?;
            let (notify, notified) = mpsc::unbounded_channel();
            let closing = Arc::new(Mutex::new(None));
            let why = Arc::clone(&closing);
            tokio::spawn(async move {
                loop {
                    match poll_fn(|cx| connection.poll_message(cx)).await {
                        Some(Ok(AsyncMessage::Notification(n))) => drop(notify.send(n.payload().to_owned())),
                        Some(Ok(_)) => {}
                        Some(Err(e)) => {
                            *why.lock() = Some(Error::from(e).message);
                            break;
                        }
                        None => break,
                    }
                }
            });
            client.batch_execute(&format!("{SESSION}{}", if durable { DURABLE_COMMIT } else { ASYNC_COMMIT })).await?;
            let statements = Mutex::new(HashMap::new());
            Ok(Link { client, target: self.clone(), statements, notified: Some(notified), closing })
        };
        match timeout(self.connect_timeout, making).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(e)) => {
                let e: Error = e;
                Err(Error { message: format!("could not connect to {place}: {}", e.message), ..e })
            }
            Err(_) => Err(Error::lost(format!(
                "could not connect to {place}: no answer within {} s",
                self.connect_timeout.as_secs_f64()
            ))),
        }
    }
}

/// One connection with its prepared statements. Dropped, it is closed.
#[derive(Debug)]
pub struct Link {
    /// The client, for COPY and transactions; everything else goes through the methods here.
    pub client: Client,
    target: Target,
    statements: Mutex<HashMap<String, Statement>>,
    /// Payloads of notifications, for the listener to take.
    pub notified: Option<mpsc::UnboundedReceiver<String>>,
    closing: Arc<Mutex<Option<String>>>,
}

/// Parameters of a statement.
pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Link {
    /// Runs `work` within the statement timeout; a silent server counts as a lost connection.
    pub async fn within<T>(
        &self,
        work: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
    ) -> Result<T> {
        match timeout(self.target.statement_timeout, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => {
                let e = Error::from(e);
                // "closed" alone says little; the reader of the socket knows why.
                let why = if e.is_lost() { self.closing.lock().clone() } else { None };
                Err(match why {
                    Some(why) => Error { message: why, ..e },
                    None => e,
                })
            }
            Err(_) => Err(Error::lost(format!(
                "no answer from {} within {} s",
                self.target.place(),
                self.target.statement_timeout.as_secs_f64()
            ))),
        }
    }

    /// The named statement, prepared once a connection.
    pub async fn prepare(&self, name: &'static str) -> Result<Statement> {
        let text = self.target.statements.text(name);
        self.prepare_text(name, text).await
    }

    /// The named statement of one leaf.
    pub async fn prepare_leaf(&self, name: &'static str, leaf: i16) -> Result<Statement> {
        let key = format!("{name}/{leaf}");
        self.prepare_text(&key, &self.target.statements.leaf_text(name, leaf)).await
    }

    async fn prepare_text(&self, key: &str, text: &str) -> Result<Statement> {
        if let Some(found) = self.statements.lock().get(key) {
            return Ok(found.clone());
        }
        let statement = self.within(self.client.prepare(text)).await?;
        self.statements.lock().insert(key.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Runs a named statement and collects its rows.
    pub async fn query(&self, name: &'static str, params: Params<'_>) -> Result<Vec<Row>> {
        let statement = self.prepare(name).await?;
        self.within(self.client.query(&statement, params)).await
    }

    /// Runs a named statement that answers at most one row.
    pub async fn query_opt(&self, name: &'static str, params: Params<'_>) -> Result<Option<Row>> {
        Ok(self.query(name, params).await?.pop())
    }

    /// Runs a named statement; answers the rows it changed.
    pub async fn execute(&self, name: &'static str, params: Params<'_>) -> Result<u64> {
        let statement = self.prepare(name).await?;
        self.within(self.client.execute(&statement, params)).await
    }

    /// Runs plain text: transaction control, SET, LISTEN.
    pub async fn batch(&self, text: &str) -> Result<()> {
        self.within(self.client.batch_execute(text)).await
    }

    /// Whether the connection is known to be gone.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// The schema that the statements are rendered for.
    pub fn schema(&self) -> &str {
        &self.target.statements.schema
    }

    /// Refuses a schema that isn't there, is too old, or is newer and shut to this version.
    pub async fn check_schema(&self) -> Result<()> {
        let schema = &self.target.statements.schema;
        let wrong = |message: String| Err(Error::new(Kind::Schema, message));
        let row = match self.query_opt("check_schema", &[]).await {
            Ok(row) => row,
            Err(e) if matches!(e.sqlstate(), Some("42P01" | "3F000")) => None,
            Err(e) => return Err(e),
        };
        let Some(row) = row else {
            return wrong(format!("schema {schema:?} of {} is not migrated: run `fastq migrate`", self.target.place()));
        };
        let (version, oldest): (i32, String) = (row.get(0), row.get(1));
        let known = MIGRATIONS.last().map_or(0, |m| m.0);
        if version < known {
            return wrong(format!(
                "schema {schema:?} is at step {version} and this fastq needs step {known}: run `fastq migrate`"
            ));
        }
        if version > known && parse_version(&oldest) > parse_version(env!("CARGO_PKG_VERSION")) {
            return wrong(format!(
                "schema {schema:?} works with fastq {oldest} and later, and this is {}: upgrade it",
                env!("CARGO_PKG_VERSION")
            ));
        }
        Ok(())
    }
}

/// `1.2.3` as numbers, for comparison; what is no number counts as 0.
fn parse_version(text: &str) -> [u64; 3] {
    let mut parts = text.split('.').map(|p| p.parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

/// Delays between attempts to connect: doubling from 50 ms to 5 s, each cut by a random part of up to half, so that a fleet does not
/// come back in step.
#[derive(Debug, Default)]
pub struct Backoff {
    attempt: u32,
}

impl Backoff {
    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let full = Duration::from_millis(50).saturating_mul(1 << self.attempt.min(7)).min(Duration::from_secs(5));
        self.attempt += 1;
        full.mul_f64(1.0 - random_f64() / 2.0)
    }

    /// Start over after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// 64 random bits from the standard library's seeded hasher: good enough for ids and jitter, and no dependency.
pub fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u128(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos()));
    hasher.finish()
}

/// Uniform in [0, 1).
#[allow(clippy::cast_precision_loss, reason = "53 bits fit")]
pub fn random_f64() -> f64 {
    (random_u64() >> 11) as f64 / (1u64 << 53) as f64
}
