//! A connection in use: prepared statements, and the limit that every wait has.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, Row, Statement};

use crate::engine::connect::Target;
use crate::engine::connect::dial::Session;
use crate::engine::connect::fault::seconds;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::sql::MIGRATIONS;

/// One connection with its prepared statements. Dropped, it is closed.
#[derive(Debug)]
pub struct Link {
    /// The client, for COPY and transactions; everything else goes through the methods here.
    pub client: Client,
    target: Target,
    /// The server, for messages.
    place: String,
    statements: Mutex<HashMap<String, Statement>>,
    /// Payloads of notifications, for the listener to take.
    pub notified: Option<mpsc::UnboundedReceiver<String>>,
    closing: Arc<Mutex<Option<String>>>,
}

/// Parameters of a statement.
pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Link {
    /// Takes a session over: drives it from now on, and tells it `first` by `deadline`.
    pub(super) async fn open(session: Session, target: Target, first: &str, deadline: Instant) -> Result<Self> {
        let Session { client, mut connection, place } = session;
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
        let limit = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let failed = |e: Error| Error { message: format!("could not connect to {place}: {}", e.message), ..e };
        match timeout(limit, client.batch_execute(first)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(failed(Error::from(e))),
            Err(_) => return Err(failed(Error::lost("no answer to the first statement in time"))),
        }
        Ok(Self { client, target, place, statements: Mutex::default(), notified: Some(notified), closing })
    }

    /// Counts a statement that goes through `client`; those of the methods here count themselves.
    pub fn count(&self) {
        self.target.sent.fetch_add(1, Ordering::Relaxed);
    }

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
                "no answer from {} within {}",
                self.place,
                seconds(self.target.statement_timeout)
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
        self.count();
        self.within(self.client.query(&statement, params)).await
    }

    /// Runs a named statement that answers at most one row.
    pub async fn query_opt(&self, name: &'static str, params: Params<'_>) -> Result<Option<Row>> {
        Ok(self.query(name, params).await?.pop())
    }

    /// Runs a named statement; answers the rows it changed.
    pub async fn execute(&self, name: &'static str, params: Params<'_>) -> Result<u64> {
        let statement = self.prepare(name).await?;
        self.count();
        self.within(self.client.execute(&statement, params)).await
    }

    /// Runs plain text: transaction control, SET, LISTEN.
    pub async fn batch(&self, text: &str) -> Result<()> {
        self.count();
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
            return wrong(format!("schema {schema:?} of {} is not migrated: run `fastq migrate`", self.place));
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
