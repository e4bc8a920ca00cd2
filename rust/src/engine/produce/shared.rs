//! What all parts of a producer share: settings, counters, connections that come back, reserved ids and known lanes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;

use crate::engine::connect::{Backoff, Link, Target};
use crate::engine::error::{Error, Result};
use crate::engine::logs::{Level, Outbox, Said};
use crate::engine::produce::ids::{BLOCK, Run, Stock};
use crate::engine::produce::notify::Notifier;
use crate::engine::produce::task::LaneKey;
use crate::engine::rights;

/// The part's name in logs.
pub(super) const PART: &str = "producer";
/// Blocks reserved at once by a fast producer: 100,000 ids.
const MOST_BLOCKS: usize = 100;
/// A leaf is open for hours; what was heard of it longer ago than this is asked again. A stale one does no harm.
const LEAF_AGE: Duration = Duration::from_secs(60);
/// Lanes remembered, so that types made up by the task don't fill the memory.
const MOST_LANES: usize = 10_000;

/// All that a producer is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes that a payload may have.
    pub payload_limit: usize,
    /// Limit for making a connection: beyond it a call fails.
    pub connect_timeout: Duration,
    /// Limit for one statement's answer.
    pub statement_timeout: Duration,
    /// A streaming call whose iterable gives nothing for this long while its transaction is open is rolled back.
    pub iterable_timeout: Duration,
    /// Wake consumers after a commit.
    pub notify: bool,
}

/// Counters since the start.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Stats {
    pub enqueued: AtomicU64,
    pub flights: AtomicU64,
    pub statements: AtomicU64,
    pub commits: AtomicU64,
    pub notifies: AtomicU64,
    pub reconnects: AtomicU64,
}

impl Stats {
    /// Adds to a counter.
    pub(super) fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// The counters by name.
    pub fn read(&self) -> [(&'static str, u64); 6] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("enqueued", get(&self.enqueued)),
            ("flights", get(&self.flights)),
            ("statements", get(&self.statements)),
            ("commits", get(&self.commits)),
            ("notifies", get(&self.notifies)),
            ("reconnects", get(&self.reconnects)),
        ]
    }
}

/// A connection is gone, and its place empty.
fn note_loss(shared: &Shared, why: &Error) {
    Stats::add(&shared.stats.reconnects, 1);
    // The server may have crashed and gone back: its sequence too.
    shared.supply.state.lock().stock.clear();
    shared.complain("lost a connection", why);
}

/// One connection's place: made on demand, made again when it was lost.
#[derive(Debug, Default)]
pub(super) struct Line(AsyncMutex<Option<Arc<Link>>>);

impl Line {
    /// The connection, made now if there is none; fails when that is not done by `deadline`.
    pub(super) async fn get(&self, shared: &Shared, deadline: Instant) -> Result<Arc<Link>> {
        let mut link = self.0.lock().await;
        match &*link {
            Some(link) if !link.is_closed() => return Ok(Arc::clone(link)),
            Some(_) => note_loss(shared, &Error::lost("it was closed while nothing was under way")),
            None => {}
        }
        *link = None;
        let made = Arc::new(shared.connect(deadline).await?);
        *link = Some(Arc::clone(&made));
        Ok(made)
    }

    /// The connection, where there is one.
    pub(super) async fn open(&self) -> Option<Arc<Link>> {
        self.0.lock().await.clone().filter(|link| !link.is_closed())
    }

    /// Gives this connection up: it broke, or went silent.
    pub(super) async fn forget(&self, shared: &Shared, gone: &Arc<Link>, why: &Error) {
        let mut link = self.0.lock().await;
        if link.as_ref().is_some_and(|link| Arc::ptr_eq(link, gone)) {
            *link = None;
            note_loss(shared, why);
        }
    }
}

#[derive(Debug, Default)]
struct SupplyState {
    stock: Stock,
    leaf: Option<i16>,
    reserved_at: Option<Instant>,
    /// Blocks in the next reservation.
    blocks: usize,
}

/// Reserved ids, and the leaf that was open when they were.
#[derive(Debug, Default)]
pub(super) struct Supply {
    state: Mutex<SupplyState>,
    filling: AsyncMutex<()>,
}

/// The state that a producer's parts share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) target: Target,
    pub(super) settings: Settings,
    pub(super) outbox: Arc<Outbox>,
    pub(super) stats: Stats,
    /// Single enqueues, ids, lanes, notifications.
    pub(super) direct: Line,
    /// COPY streams, one transaction at a time.
    pub(super) bulk: Arc<AsyncMutex<Option<Arc<Link>>>>,
    pub(super) notifier: Notifier,
    supply: Supply,
    lanes: Mutex<HashMap<Arc<LaneKey>, i32>>,
    said: Mutex<Said>,
}

impl Shared {
    pub(super) fn new(target: Target, settings: Settings) -> Self {
        Self {
            target,
            settings,
            outbox: Arc::default(),
            stats: Stats::default(),
            direct: Line::default(),
            bulk: Arc::default(),
            notifier: Notifier::default(),
            supply: Supply::default(),
            lanes: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// Logs what went wrong, unless it was said already.
    pub(super) fn complain(&self, what: &str, why: &Error) {
        if self.said.lock().is_news(why) {
            self.outbox.log(Level::Warning, PART, format!("{what}: {why}"));
        }
    }

    /// Something was written: what went wrong is over.
    pub(super) fn recover(&self) {
        if self.said.lock().end() {
            self.outbox.log(Level::Info, PART, "enqueues again");
        }
    }

    /// When a call that begins now gives up connecting.
    pub(super) fn connect_deadline(&self) -> Instant {
        Instant::now() + self.settings.connect_timeout
    }

    /// Makes a connection whose commits are durable, to a schema that this version may use; tries again until `deadline`.
    pub(super) async fn connect(&self, deadline: Instant) -> Result<Link> {
        let mut backoff = Backoff::default();
        let mut before: Option<Error> = None;
        loop {
            let making = async {
                let link = self.target.connect_by(true, deadline).await?;
                let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                let late = |_| Error::lost(format!("{} does not answer in time", self.target.place()));
                let checks = async {
                    rights::check(&link, "producer").await?;
                    link.check_schema().await
                };
                timeout(left, checks).await.map_err(late)??;
                Ok(link)
            };
            let error: Error = match making.await {
                Ok(link) => return Ok(link),
                Err(e) => e,
            };
            let delay = backoff.delay();
            if !error.is_lost() || Instant::now() + delay >= deadline {
                // What had hardly any time left says less than what came before it.
                return Err(before.filter(|_| error.is_lost() && Instant::now() >= deadline).unwrap_or(error));
            }
            before = Some(error);
            sleep(delay).await;
        }
    }

    /// Runs a named statement that may be repeated on the direct connection, again after a reconnect until `deadline`.
    pub(super) async fn ask(&self, deadline: Instant, name: &'static str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let mut backoff = Backoff::default();
        loop {
            let link = self.direct.get(self, deadline).await?;
            Stats::add(&self.stats.statements, 1);
            match link.query(name, params).await {
                Err(e) if e.is_lost() => {
                    self.direct.forget(self, &link, &e).await;
                    // One that lets us in and then refuses, as while it recovers, would be asked without end.
                    // Not given up before its time either: whoever still has some would ask again at once.
                    let (delay, left) = (backoff.delay(), deadline.saturating_duration_since(Instant::now()));
                    sleep(delay.min(left)).await;
                    if delay >= left {
                        return Err(e);
                    }
                }
                answer => return answer,
            }
        }
    }

    /// `n` ids as runs, and the open leaf.
    pub(super) async fn take_ids(self: &Arc<Self>, n: usize, deadline: Instant) -> Result<(i16, Vec<Run>)> {
        loop {
            if let Some(taken) = self.try_take_ids(n) {
                return Ok(taken);
            }
            let _filling = self.supply.filling.lock().await;
            if let Some(taken) = self.try_take_ids(n) {
                return Ok(taken);
            }
            self.reserve(n, deadline).await?;
        }
    }

    fn try_take_ids(self: &Arc<Self>, n: usize) -> Option<(i16, Vec<Run>)> {
        let mut state = self.supply.state.lock();
        let leaf = state.leaf?;
        let runs = state.stock.take(n)?;
        let is_low = 2 * state.stock.left() < state.blocks * usize::try_from(BLOCK).unwrap_or(1);
        let is_old = state.reserved_at.is_none_or(|at| at.elapsed() > LEAF_AGE);
        drop(state);
        if is_low || is_old {
            self.refill();
        }
        Some((leaf, runs))
    }

    /// Reserves the next blocks before the present ones run out, so that nobody waits for them.
    fn refill(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(_filling) = shared.supply.filling.try_lock() {
                // A failure shows at the next enqueue, which needs the same connection.
                drop(shared.reserve(0, shared.connect_deadline()).await);
            }
        });
    }

    /// Reserves at least `n` ids. The caller holds `filling`.
    async fn reserve(&self, n: usize, deadline: Instant) -> Result<()> {
        let needed = n.div_ceil(usize::try_from(BLOCK).unwrap_or(1)).max(1);
        let blocks = {
            let mut state = self.supply.state.lock();
            // Twice as many where the last ones were gone within a second, one again where they lasted.
            let was_fast = state.reserved_at.is_some_and(|at| at.elapsed() < Duration::from_secs(1));
            state.blocks = if was_fast { (2 * state.blocks).min(MOST_BLOCKS) } else { 1 }.max(needed);
            state.blocks
        };
        let count = i32::try_from(blocks).unwrap_or(i32::MAX);
        let rows = self.ask(deadline, "reserve_ids", &[&count]).await?;
        let mut state = self.supply.state.lock();
        // Asked only for the leaf, time after time, the stock would grow.
        let is_full = state.stock.left() >= 2 * blocks * usize::try_from(BLOCK).unwrap_or(1);
        for row in &rows {
            if !is_full {
                state.stock.add_block(row.try_get("lo")?);
            }
            // Without an open leaf the one that was open last goes on.
            state.leaf = row.try_get::<_, Option<i16>>("open_leaf")?.or(state.leaf).or(Some(0));
        }
        state.reserved_at = Some(Instant::now());
        Ok(())
    }

    /// Forgets reserved ids: some of them are taken.
    pub(super) fn forget_ids(&self) {
        self.supply.state.lock().stock.clear();
    }

    /// The lane's id; a lane that is new is made, in a transaction of its own, so that no other call waits for this one's end.
    pub(super) async fn lane(&self, key: &Arc<LaneKey>, deadline: Instant) -> Result<i32> {
        if let Some(&id) = self.lanes.lock().get(key) {
            return Ok(id);
        }
        let params: [Param<'_>; 3] = [&key.queue, &key.kind, &key.priority];
        let mut rows = self.ask(deadline, "find_lane", &params[..]).await?;
        if rows.is_empty() {
            self.ask(deadline, "create_lane", &params[..]).await?;
            rows = self.ask(deadline, "find_lane", &params[..]).await?;
        }
        let row = rows.first().ok_or_else(|| Error::lost(format!("the lane of type {:?} vanished", key.kind)))?;
        let id = row.try_get(0)?;
        let mut lanes = self.lanes.lock();
        if lanes.len() >= MOST_LANES {
            lanes.clear();
        }
        lanes.insert(Arc::clone(key), id);
        Ok(id)
    }
}

/// A parameter of a statement.
pub(super) type Param<'a> = &'a (dyn tokio_postgres::types::ToSql + Sync);
