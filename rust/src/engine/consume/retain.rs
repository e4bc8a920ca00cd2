//! Retention, the leader's slow work: opens the next leaf, empties old ones whole, forgets dead tasks, errors, tokens and results. One small
//! step a tick, so that heartbeat and rescue never wait for it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::types::ToSql;

use crate::engine::connect::Link;
use crate::engine::consume::Shared;
use crate::engine::consume::control::seconds;
use crate::engine::consume::counters::Counters;
use crate::engine::error::Result;
use crate::engine::logs::Level;

/// Between two rounds: this share of the retention, within these bounds.
const ROUND_SHARE: u32 = 16;
const ROUND: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A tick goes on to the next step for this long, then leaves the rest to the next one.
const SLICE: Duration = Duration::from_millis(50);
/// Delayed tasks, dead rows, errors, tokens or results that one statement moves or forgets.
const BATCH: i64 = 500;
/// Chunks that one statement moves to the open leaf, of up to 500 tasks each.
const CHUNKS: i64 = 20;
/// A leaf is open for this share of the retention, so that at most nine of sixteen are in use.
const LEAF_SHARE: u32 = 8;
/// A token is held while its task's content is kept anywhere, and this long at least, however soon its task is forgotten: a client that
/// sends the same request again some minutes later must meet the token. A failed task is found by its content in its leaf, too, so with
/// a `failed_retention` below the completed one its token goes when the leaf does.
const TOKEN_AGE: Duration = Duration::from_secs(3_600);
/// What completed in a queue that keeps it for less time than its leaf stays goes row by row: each round goes on where all before it is
/// gone or stays. For what ended late one begins at the start: after this share of the shortest time, at most this often, and after as
/// long as the last one took.
const WHOLE_WALK_SHARE: u32 = 4;
const WHOLE_WALK: Duration = Duration::from_secs(5);
/// How long a leaf's lock is waited for: a reader's open transaction makes us give up, and claims wait no longer than this.
const LOCK_WAIT: &str = "50ms";

/// How long tasks are kept that ended so.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Completed.
    pub completed: Duration,
    /// Failed for good.
    pub failed: Duration,
    /// Cancelled.
    pub cancelled: Duration,
    /// Not begun in time.
    pub expired: Duration,
}

/// For how long each queue's tasks are kept.
#[derive(Debug, Clone)]
pub struct Retentions {
    /// Of queues that are not named.
    pub rest: Kept,
    /// Of those that are.
    pub queues: Vec<(String, Kept)>,
}

impl Retentions {
    fn each(&self) -> impl Iterator<Item = (Option<&str>, &Kept)> {
        std::iter::once((None, &self.rest)).chain(self.queues.iter().map(|(queue, kept)| (Some(queue.as_str()), kept)))
    }

    /// How long a leaf stays: the longest that anything completed in it is kept.
    fn leaf(&self) -> Duration {
        self.each().map(|(_, kept)| kept.completed).max().unwrap_or_default()
    }

    /// The parameters of `purge_dead`: states, queues, seconds.
    fn dead(&self) -> (Vec<&'static str>, Vec<Option<String>>, Vec<f64>) {
        let (mut states, mut queues, mut times) = (Vec::new(), Vec::new(), Vec::new());
        for (queue, kept) in self.each() {
            for (state, time) in [("failed", kept.failed), ("cancelled", kept.cancelled), ("expired", kept.expired)] {
                states.push(state);
                queues.push(queue.map(str::to_owned));
                times.push(seconds(time));
            }
        }
        (states, queues, times)
    }

    /// The parameters of `purge_done`: queues, and seconds, infinite where the leaf stays no longer. None: so it is for all.
    fn done(&self) -> Option<(Vec<Option<String>>, Vec<f64>)> {
        let leaf = self.leaf();
        let time = |kept: &Kept| if kept.completed < leaf { seconds(kept.completed) } else { f64::INFINITY };
        let rules = self.each().map(|(queue, kept)| (queue.map(str::to_owned), time(kept))).unzip();
        self.each().any(|(_, kept)| kept.completed < leaf).then_some(rules)
    }

    fn shortest(&self) -> Duration {
        let times = self.each().flat_map(|(_, k)| [k.completed, k.failed, k.cancelled, k.expired]);
        times.min().unwrap_or_default()
    }
}

/// What comes next in a round.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    OpenLeaf,
    ListLeaves,
    MoveChunks(i16),
    CarryDelayed(i16),
    EmptyLeaf(i16),
    ListUsedLeaves,
    PurgeDone(Walk),
    PurgeDead,
    PurgeErrors(i64),
    PurgeTokens(String, String),
    PurgeResults,
}

/// A way through the completions of a leaf, by their first task.
#[derive(Debug, Clone, PartialEq)]
struct Walk {
    leaf: i16,
    after: i64,
    /// The first that will have to go, and is not due yet.
    first_kept: Option<i64>,
}

/// See the module.
#[derive(Debug)]
pub struct Retention {
    kept: Retentions,
    step: Step,
    leaves: Vec<i16>,
    /// Up to where the completions of a leaf need no look.
    walked: BTreeMap<i16, i64>,
    whole_walk_due: Instant,
    whole_walk_began: Option<Instant>,
    due: Instant,
    /// No step of this round has failed.
    is_clean: bool,
}

impl Retention {
    /// The first round comes at once.
    pub fn new(kept: &Retentions) -> Self {
        let now = Instant::now();
        Self {
            kept: kept.clone(),
            step: Step::OpenLeaf,
            leaves: Vec::new(),
            walked: BTreeMap::new(),
            whole_walk_due: now,
            whole_walk_began: None,
            due: now,
            is_clean: true,
        }
    }

    /// The steps that are due, for a short while, which ends at `beat_at` at the latest, but one in any case. True: a round is
    /// over, and each of its steps has worked.
    pub async fn work(
        &mut self,
        shared: &Shared,
        link: &Link,
        (me, term): (i64, i64),
        beat_at: Instant,
    ) -> Result<bool> {
        let until = beat_at.min(Instant::now() + SLICE);
        let mut is_over = false;
        while Instant::now() >= self.due {
            let step = self.step.clone();
            if let Err(e) = self.step(shared, link, me, term).await {
                self.skip(step);
                return Err(e);
            }
            if self.step == Step::OpenLeaf {
                is_over |= std::mem::replace(&mut self.is_clean, true);
            }
            if Instant::now() >= until {
                break;
            }
        }
        Ok(is_over)
    }

    async fn step(&mut self, shared: &Shared, link: &Link, me: i64, term: i64) -> Result<()> {
        Counters::add(&shared.counters.statements, 1);
        let kept = seconds(self.kept.leaf());
        self.step = match std::mem::replace(&mut self.step, Step::OpenLeaf) {
            Step::OpenLeaf => {
                let rows = link.query("open_leaf", &[&me, &term, &(kept / f64::from(LEAF_SHARE))]).await?;
                if let Some(row) = rows.first() {
                    shared.log(Level::Info, "leader", format!("opened leaf {}", row.get::<_, i16>(0)));
                }
                Step::ListLeaves
            }
            Step::ListLeaves => {
                let rows = link.query("list_leaves_to_empty", &[&kept]).await?;
                self.leaves = rows.iter().rev().map(|r| r.get(0)).collect();
                self.next_leaf()
            }
            Step::MoveChunks(leaf) => {
                let row = link.query_opt("move_chunks", &[&me, &term, &leaf, &CHUNKS]).await?;
                let moved: i64 = row.map_or(0, |r| r.get("chunks"));
                if moved > 0 { Step::MoveChunks(leaf) } else { Step::CarryDelayed(leaf) }
            }
            Step::CarryDelayed(leaf) => {
                let row = link.query_opt("carry_delayed", &[&me, &term, &leaf, &BATCH]).await?;
                let carried: i64 = row.map_or(0, |r| r.get("tasks"));
                if carried > 0 { Step::CarryDelayed(leaf) } else { Step::EmptyLeaf(leaf) }
            }
            Step::EmptyLeaf(leaf) => {
                match self.empty(shared, link, me, term, leaf).await {
                    Ok(true) => shared.log(Level::Info, "leader", format!("emptied leaf {leaf}")),
                    Ok(false) => {}
                    // Someone reads it, or still writes to it: again in the next round.
                    Err(e) if e.sqlstate() == Some("55P03") => {
                        shared.log(Level::Debug, "leader", format!("leaf {leaf} is in use: {e}"));
                    }
                    Err(e) => return Err(e),
                }
                self.next_leaf()
            }
            Step::ListUsedLeaves => {
                let now = Instant::now();
                if now >= self.whole_walk_due {
                    self.walked.clear();
                    self.whole_walk_began = Some(now);
                }
                let rows = link.query("list_used_leaves", &[]).await?;
                self.leaves = rows.iter().rev().map(|r| r.get(0)).collect();
                self.walked.retain(|leaf, _| self.leaves.contains(leaf));
                self.next_walk()
            }
            Step::PurgeDone(walk) => self.purge_done(link, (me, term), walk).await?,
            Step::PurgeDead => {
                let (states, queues, times) = self.kept.dead();
                let row = link.query_opt("purge_dead", &[&me, &term, &states, &queues, &times, &BATCH]).await?;
                let gone: i64 = row.map_or(0, |r| r.get(0));
                if gone == BATCH { Step::PurgeDead } else { Step::PurgeErrors(0) }
            }
            Step::PurgeErrors(after) => {
                let age = seconds(self.kept.rest.completed);
                let row = link.query_opt("purge_errors", &[&me, &term, &age, &after, &BATCH]).await?;
                match row.and_then(|r| r.get::<_, Option<i64>>("last_id")) {
                    Some(last) => Step::PurgeErrors(last),
                    None => Step::PurgeTokens(String::new(), String::new()),
                }
            }
            Step::PurgeTokens(kind, token) => {
                let age = seconds(self.kept.rest.completed.max(TOKEN_AGE));
                let row = link.query_opt("purge_tokens", &[&me, &term, &age, &kind, &token, &BATCH]).await?;
                let last = row.and_then(|r| {
                    Some((r.get::<_, Option<String>>("last_type")?, r.get::<_, Option<String>>("last_token")?))
                });
                last.map_or(Step::PurgeResults, |(kind, token)| Step::PurgeTokens(kind, token))
            }
            Step::PurgeResults => {
                let row = link.query_opt("purge_results", &[&me, &term, &BATCH]).await?;
                if row.map_or(0, |r| r.get::<_, i64>(0)) == BATCH {
                    Step::PurgeResults
                } else {
                    self.due = Instant::now() + self.round();
                    Step::OpenLeaf
                }
            }
        };
        Ok(())
    }

    /// What failed is tried again in the next round; what does not depend on it goes on in this one.
    fn skip(&mut self, failed: Step) {
        self.is_clean = false;
        self.step = match failed {
            Step::OpenLeaf => Step::ListLeaves,
            Step::ListLeaves => self.after_leaves(),
            Step::ListUsedLeaves => Step::PurgeDead,
            Step::PurgeDone(_) => self.next_walk(),
            Step::MoveChunks(_) | Step::CarryDelayed(_) | Step::EmptyLeaf(_) => self.next_leaf(),
            Step::PurgeDead => Step::PurgeErrors(0),
            Step::PurgeErrors(_) => Step::PurgeTokens(String::new(), String::new()),
            Step::PurgeTokens(..) => Step::PurgeResults,
            Step::PurgeResults => {
                self.is_clean = true;
                self.due = Instant::now() + self.round();
                Step::OpenLeaf
            }
        };
    }

    fn round(&self) -> Duration {
        (self.kept.shortest() / ROUND_SHARE).clamp(ROUND.0, ROUND.1)
    }

    fn next_leaf(&mut self) -> Step {
        self.leaves.pop().map_or_else(|| self.after_leaves(), Step::MoveChunks)
    }

    fn after_leaves(&self) -> Step {
        if self.kept.done().is_some() { Step::ListUsedLeaves } else { Step::PurgeDead }
    }

    fn next_walk(&mut self) -> Step {
        if let Some(leaf) = self.leaves.pop() {
            let after = self.walked.get(&leaf).copied().unwrap_or(0);
            return Step::PurgeDone(Walk { leaf, after, first_kept: None });
        }
        if let Some(began) = self.whole_walk_began.take() {
            let pause = WHOLE_WALK.max(self.kept.shortest() / WHOLE_WALK_SHARE).max(began.elapsed());
            self.whole_walk_due = Instant::now() + pause;
        }
        Step::PurgeDead
    }

    async fn purge_done(&mut self, link: &Link, (me, term): (i64, i64), mut walk: Walk) -> Result<Step> {
        let Some((queues, times)) = self.kept.done() else { return Ok(Step::PurgeDead) };
        let values: [&(dyn ToSql + Sync); 7] = [&me, &term, &walk.leaf, &queues, &times, &BATCH, &walk.after];
        let Some(row) = link.query_opt("purge_done", &values).await? else { return Ok(self.next_walk()) };
        walk.after = row.get::<_, Option<i64>>("last_id").unwrap_or(walk.after);
        walk.first_kept = walk.first_kept.or(row.get("first_kept"));
        if row.get("more") {
            return Ok(Step::PurgeDone(walk));
        }
        self.walked.insert(walk.leaf, walk.first_kept.map_or(walk.after, |first| first - 1));
        Ok(self.next_walk())
    }

    /// Empties a leaf of `task` and of `done` in one transaction, if nothing names it any more.
    async fn empty(&self, shared: &Shared, link: &Link, me: i64, term: i64, leaf: i16) -> Result<bool> {
        link.batch(&format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
        let emptied = self.empty_in_transaction(shared, link, me, term, leaf).await;
        link.batch(if matches!(emptied, Ok(true)) { "COMMIT" } else { "ROLLBACK" }).await?;
        emptied
    }

    async fn empty_in_transaction(&self, shared: &Shared, link: &Link, me: i64, term: i64, leaf: i16) -> Result<bool> {
        link.execute_leaf("lock_leaf", leaf).await?;
        let row = link.query_opt("check_leaf_empty", &[&me, &term, &leaf, &seconds(self.kept.leaf())]).await?;
        if !row.is_some_and(|r| r.get(0)) {
            return Ok(false);
        }
        link.execute_leaf("truncate_leaf", leaf).await?;
        link.execute("free_leaf", &[&leaf]).await?;
        Counters::add(&shared.counters.statements, 4);
        Ok(true)
    }
}
