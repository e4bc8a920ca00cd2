//! One flight of single enqueues: numbered, sent in one transaction, and found again when its answer was lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::sleep;

use crate::engine::connect::{Backoff, Link};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::copy::{ChunkColumns, Chunker};
use crate::engine::produce::ids::RunIter;
use crate::engine::produce::notify::{announce, take_turn};
use crate::engine::produce::shared::{Line, Param, Shared, Stats};
use crate::engine::produce::swap::{self, Swaps};
use crate::engine::produce::task::{NewTask, When, expiries};
use crate::engine::produce::texts::Params;
use crate::engine::produce::tokens::{self, Wanted};
use crate::engine::sql;

/// Tries of one flight, over reconnects, deadlocks and doubts.
const TRIES: usize = 100;
/// Pause before a try that somebody else's transaction decides.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Blocks of ids that turn out to be taken before that is an error.
const BLOCKS: usize = 20;

/// How a flight is sent.
pub(super) struct Manner<'a> {
    /// The connection.
    pub(super) line: &'a Line,
    /// How long a token may be waited for that somebody's open transaction holds.
    pub(super) lock_timeout: Duration,
    /// When to give up connecting.
    pub(super) deadline: Instant,
}

/// What sending came to.
enum Sent {
    /// Committed.
    Done,
    /// A first try that was thought lost is in.
    Already,
    /// Somebody else's tasks have the ids.
    Never,
}

/// Tasks with their lanes, ids and what became of their tokens.
struct Plan<'a> {
    tasks: &'a [&'a NewTask],
    lanes: Vec<i32>,
    /// Positions of tasks: those that are alike together, so that their ids run without gaps.
    order: Vec<usize>,
    /// Tokens, sorted, each once.
    wanted: Vec<Wanted<'a>>,
    /// Tasks whose token an earlier task of the flight has.
    twins: Vec<(usize, usize)>,
    leaf: i16,
    /// By task.
    ids: Vec<i64>,
    /// By task: who holds its token; 0: nobody else.
    holders: Vec<i64>,
}

/// Enqueues all of them or none; answers per task its id and whether it is new.
pub(super) async fn send(shared: &Arc<Shared>, tasks: &[&NewTask], manner: &Manner<'_>) -> Result<Vec<(i64, bool)>> {
    let mut plan = Plan::new(shared, tasks, manner.deadline).await?;
    for _ in 0..BLOCKS {
        plan.number(shared, manner.deadline).await?;
        if plan.send_numbered(shared, manner).await? {
            Stats::add(&shared.stats.enqueued, plan.is_new().filter(|&new| new).count());
            shared.recover();
            return Ok(plan.answers());
        }
        // Somebody else's tasks have these ids: the sequence went back, and so would the rest of the block.
        shared.forget_ids();
    }
    Err(Error::new(Kind::Enqueue, "the ids that the database handed out were taken, again and again"))
}

impl<'a> Plan<'a> {
    async fn new(shared: &Arc<Shared>, tasks: &'a [&'a NewTask], deadline: Instant) -> Result<Self> {
        let mut lanes = Vec::with_capacity(tasks.len());
        for task in tasks {
            lanes.push(shared.lane(&task.lane, deadline).await?);
        }
        let mut order: Vec<_> = (0..tasks.len()).collect();
        order.sort_by_key(|&n| {
            (tasks[n].when.is_some(), lanes[n], tasks[n].max_attempts, tasks[n].expires_at.is_some())
        });
        let with_token = |(n, task): (usize, &&'a NewTask)| {
            Some(Wanted::new(task.token_kind(), task.token.as_deref()?, n, task.rule))
        };
        let mut wanted: Vec<_> = tasks.iter().enumerate().filter_map(with_token).collect();
        let twins = tokens::sort(&mut wanted);
        Ok(Self { tasks, lanes, order, wanted, twins, leaf: 0, ids: Vec::new(), holders: vec![0; tasks.len()] })
    }

    /// Gives every task an id.
    async fn number(&mut self, shared: &Arc<Shared>, deadline: Instant) -> Result<()> {
        let (leaf, runs) = shared.take_ids(self.tasks.len(), deadline).await?;
        self.leaf = leaf;
        self.ids = vec![0; self.tasks.len()];
        for (&n, id) in self.order.iter().zip(RunIter::new(runs)) {
            self.ids[n] = id;
        }
        Ok(())
    }

    /// Sends until it is known to be in, over reconnects. False: the ids are somebody else's.
    async fn send_numbered(&mut self, shared: &Arc<Shared>, manner: &Manner<'_>) -> Result<bool> {
        // Once an answer was lost, it must first be found out what became of it, for as long as that may take.
        let mut doubt: Option<Instant> = None;
        let mut backoff = Backoff::default();
        for _ in 0..TRIES {
            let link =
                manner.line.get(shared, doubt.unwrap_or(manner.deadline)).await.map_err(|e| in_doubt(e, doubt))?;
            let error = match self.send_once(shared, &link, manner, doubt.is_some()).await {
                Ok(Some(is_ours)) => return Ok(is_ours),
                Ok(None) => continue,
                // Its tokens were waited for: a first try is not in.
                Err(e) if matches!(e.kind, Kind::Duplicate { .. }) => return Err(e),
                Err(e) => e,
            };
            match error.sqlstate() {
                _ if error.is_lost() => {
                    manner.line.forget(shared, &link, &error).await;
                    if !error.is_read_only() {
                        let limit = shared.settings.statement_timeout.max(shared.settings.connect_timeout);
                        doubt.get_or_insert_with(|| Instant::now() + limit);
                    }
                    let left = doubt.unwrap_or(manner.deadline).saturating_duration_since(Instant::now());
                    sleep(backoff.delay().min(left)).await;
                    if doubt.is_none() && Instant::now() >= manner.deadline {
                        return Err(error);
                    }
                }
                Some("23505") if doubt.is_none() => return Ok(false),
                // The first try was still under way, and came through or has it all locked.
                Some("23505" | "55P03" | "40P01" | "40001") if doubt.is_some() => sleep(LOOK_AGAIN).await,
                Some("40P01" | "40001") if self.wanted.is_empty() => sleep(LOOK_AGAIN).await,
                _ => return Err(in_doubt(error, doubt)),
            }
            if doubt.is_some_and(|until| Instant::now() >= until) {
                return Err(in_doubt(error, doubt));
            }
        }
        Err(in_doubt(Error::new(Kind::Enqueue, format!("it did not succeed in {TRIES} tries")), doubt))
    }

    /// One try: Some(true) it is in, Some(false) the ids are somebody else's, None: look again.
    async fn send_once(
        &mut self,
        shared: &Arc<Shared>,
        link: &Arc<Link>,
        manner: &Manner<'_>,
        is_again: bool,
    ) -> Result<Option<bool>> {
        if is_again {
            match self.look(link).await? {
                Seen::Ours => {
                    // Seen is not yet durable: the first try's flush may be what was lost.
                    link.execute("flush_log", &[]).await?;
                    return Ok(Some(true));
                }
                Seen::Strangers => return Ok(Some(false)),
                Seen::Nothing => {}
            }
        }
        Ok(match self.transact(shared, link, manner, is_again).await? {
            Sent::Done => Some(true),
            Sent::Already => None,
            Sent::Never => Some(false),
        })
    }

    async fn transact(
        &mut self,
        shared: &Arc<Shared>,
        link: &Arc<Link>,
        manner: &Manner<'_>,
        is_again: bool,
    ) -> Result<Sent> {
        self.holders.fill(0);
        let mut begin = "BEGIN".to_owned();
        if !self.wanted.is_empty() {
            begin = format!("BEGIN; SET LOCAL lock_timeout = {}", manner.lock_timeout.as_millis());
            let held = tokens::take(shared, link, Some(&begin), &self.wanted, |n| self.ids[n]).await;
            let held = rolled_back(link, held).await?;
            if held.iter().any(|&(place, id)| self.ids[self.wanted[place].task] == id) {
                link.batch("ROLLBACK").await?;
                // A token that answers with our own id: the first try is in after all; without one, the ids were used before.
                return Ok(if is_again { Sent::Already } else { Sent::Never });
            }
            self.settle(&held);
            let refused = self.refused();
            rolled_back(link, refused).await?;
            begin.clear();
        }
        let work = self.write(shared, link, manner, &begin, is_again).await;
        rolled_back(link, work).await
    }

    /// Notes who holds which tokens.
    fn settle(&mut self, held: &[(usize, i64)]) {
        for &(place, id) in held {
            self.holders[self.wanted[place].task] = id;
        }
        for &(twin, first) in &self.twins {
            self.holders[twin] = if self.holders[first] == 0 { self.ids[first] } else { self.holders[first] };
        }
    }

    /// A call of many goes in whole or not at all: an error where one of its tasks must not meet its token. The error's index is the
    /// position in the flight.
    fn refused(&self) -> Result<()> {
        let is_refused = |n: &usize| self.tasks[*n].is_of_many && self.tasks[*n].rule.raises() && self.holders[*n] != 0;
        let Some(n) = (0..self.tasks.len()).find(is_refused) else { return Ok(()) };
        let is_own = self.ids.contains(&self.holders[n]);
        Err(Error::duplicate((!is_own).then_some(self.holders[n])).at(n as u64))
    }

    /// What tasks bring to those that hold their tokens.
    fn swaps(&self) -> Vec<Params> {
        let mut swaps = Swaps::default();
        for (task, &holder) in self.tasks.iter().zip(&self.holders) {
            if holder != 0 {
                swaps.bring(holder, task.rule.on_conflict, (*task).into());
            }
        }
        swaps.params()
    }

    /// Writes the tasks and commits, all in one go. `begin` is empty where the transaction is open.
    async fn write(
        &self,
        shared: &Arc<Shared>,
        link: &Arc<Link>,
        manner: &Manner<'_>,
        begin: &str,
        is_again: bool,
    ) -> Result<Sent> {
        let new = || self.order.iter().copied().filter(|&n| self.holders[n] == 0);
        let now: Vec<_> = new().filter(|&n| self.tasks[n].when.is_none()).collect();
        let later: Vec<_> = new().filter(|&n| self.tasks[n].when.is_some()).collect();
        let (now_columns, later_columns) = (Columns::of(self, &now), Columns::of(self, &later));
        let (delays, times): (Vec<_>, Vec<_>) = self.whens(&later).unzip();
        let chunks = self.chunks(&now);
        let is_direct = std::ptr::eq(manner.line, &raw const shared.direct);
        let is_alone = !begin.is_empty() && !is_again && (now.is_empty() || later.is_empty());
        let turn = if is_alone && is_direct && later.is_empty() { take_turn(shared, &chunks.lanes) } else { None };
        let channel = sql::channel(&shared.target.statements.schema);
        let enqueue: [Param<'_>; 15] = [
            &self.leaf,
            &now_columns.ids,
            &now_columns.lanes,
            &now_columns.max_attempts,
            &now_columns.formats,
            &now_columns.payloads,
            &chunks.lanes,
            &chunks.max_attempts,
            &chunks.task_bytes,
            &chunks.los,
            &chunks.his,
            &channel,
            &turn,
            &now_columns.expiries,
            &chunks.expiries,
        ];
        let (enqueue_name, enqueue) = enqueuing(&enqueue, !chunks.expiries.is_empty());
        let delay: [Param<'_>; 8] = [
            &later_columns.ids,
            &later_columns.lanes,
            &later_columns.max_attempts,
            &later_columns.formats,
            &later_columns.payloads,
            &delays,
            &times,
            &later_columns.expiries,
        ];
        // On the direct connection the notification follows the commit without waiting for its answer; from another one it could
        // come before it.
        let tell = || announce(shared, chunks.lanes.iter().copied());
        let ready = async {
            if is_direct {
                tell();
            }
        };
        Stats::add(&shared.stats.flights, 1);
        Stats::add(&shared.stats.commits, 1);
        if turn.is_some() {
            Stats::add(&shared.stats.statements, 2);
            return write_and_flush(link, enqueue_name, enqueue).await;
        }
        if is_alone {
            // One statement is a transaction by itself.
            Stats::add(&shared.stats.statements, 1);
            let (name, params) = if later.is_empty() { (enqueue_name, enqueue) } else { ("delay_tasks", &delay[..]) };
            link.prepare(name).await?;
            let (sent, ()) = tokio::join!(link.execute(name, params), ready);
            sent?;
            if !is_direct {
                tell();
            }
            return Ok(Sent::Done);
        }
        for name in [enqueue_name, "delay_tasks", "find_enqueued"] {
            link.prepare(name).await?;
        }
        let opening = async { if begin.is_empty() { Ok(()) } else { link.batch(begin).await } };
        let put = async { if now.is_empty() { Ok(0) } else { link.execute(enqueue_name, enqueue).await } };
        let wait = async { if later.is_empty() { Ok(0) } else { link.execute("delay_tasks", &delay).await } };
        Stats::add(&shared.stats.statements, 4);
        let swaps = if self.wanted.is_empty() { Vec::new() } else { self.swaps() };
        if !swaps.is_empty() {
            let (opened, put, wait) = tokio::join!(opening, put, wait);
            opened.and(put).and(wait)?;
            swap::send(link, &swaps).await?;
            let (committed, ()) = tokio::join!(link.batch("COMMIT"), ready);
            committed?;
        } else if is_again && !later.is_empty() {
            // Between the look and now the first try may have come through and been promoted: then its row of `delayed` is gone
            // again and stopped nothing, and its content is to be seen.
            let (opened, put, wait) = tokio::join!(opening, put, wait);
            opened.and(put).and(wait)?;
            let ids: Vec<_> = later.iter().map(|&n| self.ids[n]).collect();
            let rows = link.query("find_enqueued", &[&ids]).await?;
            if rows.len() > later.len() {
                link.batch("ROLLBACK").await?;
                return Ok(Sent::Already);
            }
            let (committed, ()) = tokio::join!(link.batch("COMMIT"), ready);
            committed?;
        } else {
            let (opened, put, wait, committed, ()) = tokio::join!(opening, put, wait, link.batch("COMMIT"), ready);
            opened.and(put).and(wait)?;
            committed?;
        }
        if !is_direct {
            tell();
        }
        Ok(Sent::Done)
    }

    fn chunks(&self, tasks: &[usize]) -> ChunkColumns {
        let mut chunker = Chunker::new();
        for &n in tasks {
            let task = self.tasks[n];
            chunker.push(self.ids[n], self.lanes[n], task.max_attempts, task.payload.len(), task.expires_at);
        }
        ChunkColumns::from(chunker.finish())
    }

    fn whens(&self, tasks: &[usize]) -> impl Iterator<Item = (Option<f64>, Option<SystemTime>)> {
        tasks.iter().map(|&n| self.tasks[n].when.map_or((None, None), When::columns))
    }

    /// After a lost answer: are they in? Fills in who holds the tokens of those that are not.
    async fn look(&mut self, link: &Link) -> Result<Seen> {
        let rows = link.query("find_enqueued", &[&self.ids]).await?;
        if rows.is_empty() {
            return Ok(Seen::Nothing);
        }
        let by_id: HashMap<i64, usize> = self.ids.iter().enumerate().map(|(n, &id)| (id, n)).collect();
        let mut is_in = vec![false; self.tasks.len()];
        for row in &rows {
            let (id, lane, payload): (i64, i32, &[u8]) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let Some(&n) = by_id.get(&id) else { continue };
            if self.lanes[n] != lane || self.tasks[n].payload != payload {
                return Ok(Seen::Strangers);
            }
            is_in[n] = true;
        }
        self.holders.fill(0);
        let places: Vec<_> = (0..self.wanted.len()).filter(|&place| !is_in[self.wanted[place].task]).collect();
        let held = tokens::find(link, &self.wanted, &places).await?;
        self.settle(&held.iter().map(|h| (h.place, h.id)).collect::<Vec<_>>());
        Ok(Seen::Ours)
    }

    fn is_new(&self) -> impl Iterator<Item = bool> {
        self.holders.iter().map(|&holder| holder == 0)
    }

    fn answers(&self) -> Vec<(i64, bool)> {
        let answer = |(&id, &holder): (&i64, &i64)| if holder == 0 { (id, true) } else { (holder, false) };
        self.ids.iter().zip(&self.holders).map(answer).collect()
    }
}

/// What a look at the ids of a lost flight showed.
enum Seen {
    /// None of them is there.
    Nothing,
    /// They are there.
    Ours,
    /// Other tasks are.
    Strangers,
}

/// Tasks as columns.
struct Columns<'a> {
    ids: Vec<i64>,
    lanes: Vec<i32>,
    max_attempts: Vec<i16>,
    formats: Vec<i8>,
    payloads: Vec<&'a [u8]>,
    expiries: Vec<Option<SystemTime>>,
}

impl<'a> Columns<'a> {
    fn of(plan: &Plan<'a>, tasks: &[usize]) -> Self {
        Self {
            ids: tasks.iter().map(|&n| plan.ids[n]).collect(),
            lanes: tasks.iter().map(|&n| plan.lanes[n]).collect(),
            max_attempts: tasks.iter().map(|&n| plan.tasks[n].max_attempts).collect(),
            formats: tasks.iter().map(|&n| plan.tasks[n].format).collect(),
            payloads: tasks.iter().map(|&n| plan.tasks[n].payload.as_slice()).collect(),
            expiries: expiries(tasks.iter().map(|&n| plan.tasks[n].expires_at)),
        }
    }
}

/// Somebody's open transaction holds a token for too long, or crosswise.
pub(super) fn is_blocked(e: &Error) -> bool {
    matches!(e.sqlstate(), Some("55P03" | "40P01"))
}

/// Ends the transaction of a failed statement, so that the connection can go on.
pub(super) async fn rolled_back<T>(link: &Link, result: Result<T>) -> Result<T> {
    if result.as_ref().is_err_and(|e| !e.is_lost()) {
        // After a COMMIT that the server turned into a ROLLBACK there is nothing to end, which is no error.
        link.batch("ROLLBACK").await?;
    }
    result
}

/// Which statement enqueues these tasks, and with which of the parameters; the last two are when they expire.
fn enqueuing<'a, 'p>(params: &'a [Param<'p>; 15], expires: bool) -> (&'static str, &'a [Param<'p>]) {
    if expires { ("enqueue_expiring", params) } else { ("enqueue_tasks", &params[..13]) }
}

/// Enqueues, and waits for the disk in a statement of its own.
async fn write_and_flush(link: &Link, enqueue: &'static str, params: &[Param<'_>]) -> Result<Sent> {
    for name in [enqueue, "flush_log"] {
        link.prepare(name).await?;
    }
    let (sent, flushed) = tokio::join!(link.execute(enqueue, params), link.execute("flush_log", &[]));
    sent?;
    flushed.map(|_| Sent::Done).map_err(unflushed)
}

/// The tasks are in, and nobody knows whether for good: as after a lost answer, that must be found out.
fn unflushed(e: Error) -> Error {
    let message = format!("the server could not say that the log is durable: {}", e.message);
    if e.is_lost() {
        Error { closing: None, ..e }
    } else {
        Error::new(Kind::ConnectionLost { in_doubt: true }, message)
    }
}

/// Marks an error that leaves a commit's outcome unknown.
fn in_doubt(e: Error, doubt: Option<Instant>) -> Error {
    if doubt.is_none() {
        return e;
    }
    let message = format!("the commit's answer was lost, and what became of it could not be found out: {}", e.message);
    Error::new(Kind::ConnectionLost { in_doubt: true }, message)
}
