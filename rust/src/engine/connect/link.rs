//! A connection in use: its statements, prepared or (through a pooler) not, and the limit that every wait has.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, CopyInSink, Row, SimpleQueryMessage, Statement};

use crate::engine::connect::Target;
use crate::engine::connect::backoff::random_u64;
use crate::engine::connect::dial::Session;
use crate::engine::connect::fault::seconds;
use crate::engine::connect::pooler::{self, Pooled};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::sql::MIGRATIONS;

/// One connection with its statements. Dropped, it is closed.
#[derive(Debug)]
pub struct Link {
    client: Client,
    /// Something hands out the server's sessions by the transaction.
    pooled: Option<Pooled>,
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
    /// Takes a session over: drives it from now on, and tells it by `deadline` how to plan and commit.
    pub(super) async fn open(session: Session, target: Target, durable: bool, deadline: Instant) -> Result<Self> {
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
        let first = pooler::first_statement(&client, durable).await;
        let is_direct = match timeout(limit, client.simple_query(&first)).await {
            Ok(Ok(answer)) => answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(_))),
            Ok(Err(e)) => return Err(failed(Error::from(e))),
            Err(_) => return Err(failed(Error::lost("no answer to the first statement in time"))),
        };
        let pooled = (!is_direct).then(|| Pooled::new(durable));
        Ok(Self { client, pooled, target, place, statements: Mutex::default(), notified: Some(notified), closing })
    }

    /// Whether a pooler hands out the server's sessions: nothing that a session keeps may be asked for, such as LISTEN.
    pub fn is_pooled(&self) -> bool {
        self.pooled.is_some()
    }

    fn count(&self) {
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

    /// Makes ready for the named statement, so that running it is one message: what is sent together then stays together.
    pub async fn prepare(&self, name: &'static str) -> Result<()> {
        if self.pooled.is_some() {
            Box::pin(self.types_of(name)).await.map(drop)
        } else {
            self.statement(name, self.target.statements.text(name)).await.map(drop)
        }
    }

    /// The statement, prepared once a connection.
    async fn statement(&self, key: &str, text: &str) -> Result<Statement> {
        if let Some(found) = self.statements.lock().get(key) {
            return Ok(found.clone());
        }
        let statement = self.within(self.client.prepare(text)).await?;
        self.statements.lock().insert(key.to_owned(), statement.clone());
        Ok(statement)
    }

    /// The types of a statement's parameters, asked for once: a statement without a name is sent with them.
    async fn types_of(&self, name: &'static str) -> Result<Arc<[Type]>> {
        if let Some(found) = self.target.types.lock().get(name) {
            return Ok(Arc::clone(found));
        }
        // One message, so one transaction; a name that nobody else has, and that is gone at its end.
        let key = format!("fastq_{:016x}", random_u64());
        let text = format!(
            "PREPARE {key} AS {}\n; SELECT oid FROM pg_catalog.pg_prepared_statements, \
             unnest(parameter_types::oid[]) WITH ORDINALITY AS t (oid, n) WHERE name = '{key}' ORDER BY n; DEALLOCATE {key}",
            self.target.statements.text(name)
        );
        let answer = self.within(self.client.simple_query(&text)).await?;
        let read = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).and_then(|oid| Type::from_oid(oid.parse().ok()?))),
            _ => None,
        };
        let types: Option<Arc<[Type]>> = answer.iter().filter_map(read).collect();
        let types = types.ok_or_else(|| {
            Error::new(
                Kind::Schema,
                format!("statement {name} has a parameter of a type that this fastq does not know"),
            )
        })?;
        self.target.types.lock().insert(name, Arc::clone(&types));
        Ok(types)
    }

    /// One statement without a name: within the transaction that is open, else within one of its own that is told how to plan and commit,
    /// all in one flight.
    async fn send<T>(
        &self,
        pooled: &Pooled,
        work: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
    ) -> Result<T> {
        if pooled.is_open() {
            return self.within(work).await;
        }
        let opening = pooled.begin();
        let (opened, done, ended) = tokio::join!(
            self.within(self.client.batch_execute(&opening)),
            self.within(work),
            self.within(self.client.batch_execute("COMMIT"))
        );
        pooler::begun(opened)?;
        let done = done?;
        ended?;
        Ok(done)
    }

    /// Runs a named statement and collects its rows.
    pub async fn query(&self, name: &'static str, params: Params<'_>) -> Result<Vec<Row>> {
        let text = self.target.statements.text(name);
        let Some(pooled) = &self.pooled else {
            let statement = self.statement(name, text).await?;
            self.count();
            return self.within(self.client.query(&statement, params)).await;
        };
        // Boxed, so that the way without a pooler has no future of this size to carry.
        let pooled = async {
            let typed = with_types(params, &self.types_of(name).await?);
            self.count();
            self.send(pooled, self.client.query_typed(text, &typed)).await
        };
        Box::pin(pooled).await
    }

    /// Runs a named statement that answers at most one row.
    pub async fn query_opt(&self, name: &'static str, params: Params<'_>) -> Result<Option<Row>> {
        Ok(self.query(name, params).await?.pop())
    }

    /// Runs a named statement; answers the rows it changed.
    pub async fn execute(&self, name: &'static str, params: Params<'_>) -> Result<u64> {
        let text = self.target.statements.text(name);
        let Some(pooled) = &self.pooled else {
            let statement = self.statement(name, text).await?;
            self.count();
            return self.within(self.client.execute(&statement, params)).await;
        };
        let pooled = async {
            let typed = with_types(params, &self.types_of(name).await?);
            self.count();
            self.send(pooled, self.client.execute_typed(text, &typed)).await
        };
        Box::pin(pooled).await
    }

    /// Runs a named statement of one leaf, which has no parameters.
    pub async fn execute_leaf(&self, name: &'static str, leaf: i16) -> Result<()> {
        let text = self.target.statements.leaf_text(name, leaf);
        if let Some(pooled) = &self.pooled {
            return Box::pin(self.send(pooled, self.client.batch_execute(&text))).await;
        }
        let statement = self.statement(&format!("{name}/{leaf}"), &text).await?;
        self.within(self.client.execute(&statement, &[])).await.map(drop)
    }

    /// As `prepare`, for `copy_in` and `execute_leaf`.
    pub async fn prepare_leaf(&self, name: &'static str, leaf: i16) -> Result<()> {
        if self.pooled.is_some() {
            return Ok(());
        }
        self.statement(&format!("{name}/{leaf}"), &self.target.statements.leaf_text(name, leaf)).await.map(drop)
    }

    /// Begins the COPY of one leaf, in the transaction that is open.
    pub async fn copy_in(&self, name: &'static str, leaf: i16) -> Result<CopyInSink<Bytes>> {
        let text = self.target.statements.leaf_text(name, leaf);
        let statement = if self.pooled.is_some() {
            // There is no COPY without a name here. Within the transaction the session is ours; dropped, the statement is closed behind
            // the COPY and before the commit.
            Box::pin(self.within(self.client.prepare(&text))).await?
        } else {
            self.statement(&format!("{name}/{leaf}"), &text).await?
        };
        self.within(self.client.copy_in(&statement)).await
    }

    /// Runs plain text: transaction control, LISTEN.
    pub async fn batch(&self, text: &str) -> Result<()> {
        self.count();
        let Some(pooled) = &self.pooled else { return self.within(self.client.batch_execute(text)).await };
        let text = pooled.note(text);
        pooler::begun(Box::pin(self.within(self.client.batch_execute(&text))).await)
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

fn with_types<'a>(params: Params<'a>, types: &[Type]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(types.iter().cloned()).collect()
}

/// `1.2.3` as numbers, for comparison; what is no number counts as 0.
fn parse_version(text: &str) -> [u64; 3] {
    let mut parts = text.split('.').map(|p| p.parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}
