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
/// The same where tasks are archived, which costs some microseconds a task: with half of the ticks' time it keeps up with 20,000 tasks a second.
const ARCHIVE_SLICE: Duration = Duration::from_millis(250);
/// Delayed tasks, dead rows, errors, tokens or results that one statement moves or forgets.
const BATCH: i64 = 500;
/// Chunks that one statement moves to the open leaf, of up to 500 tasks each.
const CHUNKS: i64 = 20;
/// A leaf is open for this share of the retention, so that at most nine of sixteen are in use.
const LEAF_SHARE: u32 = 8;
/// Where completed tasks of all queues are deleted at once, their leaf stays for this long nevertheless, and they go row by row: a leaf that
/// closed with each round would have all that waits moved each time. The errors of what was deleted so are kept as long, for flushes in doubt.
const LEAF_AT_ONCE: Duration = Duration::from_secs(60);
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

/// How long something is kept, and what becomes of it then.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rule {
    /// Nothing: it goes at once.
    pub time: Duration,
    /// It goes into the table `archive`.
    pub is_archived: bool,
}

/// How long tasks are kept that ended so.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    /// Completed.
    pub completed: Rule,
    /// Failed for good.
    pub failed: Rule,
    /// Cancelled.
    pub cancelled: Rule,
    /// Not begun in time.
    pub expired: Rule,
}

/// The first parameters of `purge_done` and `archive_done`: queues, seconds, and whether they are archived.
type DoneRules = (Vec<Option<String>>, Vec<f64>, Vec<bool>);
/// The first parameters of `purge_dead` and `archive_dead`: states, queues, seconds, and whether they are archived.
type DeadRules = (Vec<&'static str>, Vec<Option<String>>, Vec<f64>, Vec<bool>);

/// For how long each queue's tasks are kept.
#[derive(Debug, Clone, Default)]
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
        or_at_once(self.each().map(|(_, kept)| kept.completed.time).max().unwrap_or_default())
    }

    fn dead(&self) -> DeadRules {
        let (mut states, mut queues, mut times, mut archived) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (queue, kept) in self.each() {
            for (state, rule) in [("failed", kept.failed), ("cancelled", kept.cancelled), ("expired", kept.expired)] {
                states.push(state);
                queues.push(queue.map(str::to_owned));
                times.push(seconds(rule.time));
                archived.push(rule.is_archived);
            }
        }
        (states, queues, times, archived)
    }

    /// What of a leaf goes row by row, since its queue keeps it for less time than the leaf stays; infinite: not so. None: it is so for none.
    fn short(&self) -> Option<DoneRules> {
        let leaf = self.leaf();
        let time = |rule: Rule| if rule.time < leaf { seconds(rule.time) } else { f64::INFINITY };
        self.each().any(|(_, kept)| kept.completed.time < leaf).then(|| self.rules(time))
    }

    /// What of a leaf is archived before it is emptied; infinite: not so. None: nothing is.
    fn archived(&self) -> Option<DoneRules> {
        let leaf = seconds(self.leaf());
        let time = |rule: Rule| if rule.is_archived { leaf } else { f64::INFINITY };
        self.each().any(|(_, kept)| kept.completed.is_archived).then(|| self.rules(time))
    }

    fn rules(&self, time: impl Fn(Rule) -> f64) -> DoneRules {
        let mut rules = DoneRules::default();
        for (queue, kept) in self.each() {
            rules.0.push(queue.map(str::to_owned));
            rules.1.push(time(kept.completed));
            rules.2.push(kept.completed.is_archived);
        }
        rules
    }

    /// Whether anything is archived.
    fn archives(&self) -> bool {
        self.archived().is_some() || self.dead().3.contains(&true)
    }

    fn shortest(&self) -> Duration {
        let rules = self.each().flat_map(|(_, k)| [k.completed, k.failed, k.cancelled, k.expired]);
        rules.map(|rule| rule.time).min().unwrap_or_default()
    }
}

fn or_at_once(time: Duration) -> Duration {
    if time.is_zero() { LEAF_AT_ONCE } else { time }
}

/// What comes next in a round.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    OpenLeaf,
    ListLeaves,
    MoveChunks(i16),
    CarryDelayed(i16),
    ArchiveLeaf(Walk),
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

impl Walk {
    fn new(leaf: i16, after: i64) -> Self {
        Self { leaf, after, first_kept: None }
    }

    /// Up to where all is gone, or stays.
    fn upto(&self) -> i64 {
        self.first_kept.map_or(self.after, |first| first - 1)
    }
}

/// Whether a leaf is free to be emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freed {
    Yes,
    /// Something names it still.
    No,
    /// A task ended behind the walk that archived it.
    NotArchived,
}

/// See the module.
#[derive(Debug)]
pub struct Retention {
    kept: Retentions,
    step: Step,
    leaves: Vec<i16>,
    /// Up to where the completions of a leaf need no look.
    walked: BTreeMap<i16, i64>,
    /// Up to where those of a leaf that is to be emptied have been archived. It may stay for long: one of its tasks may still run.
    archived: BTreeMap<i16, i64>,
    whole_walk_due: Instant,
    whole_walk_began: Option<Instant>,
    due: Instant,
    /// No step of this round has failed.
    is_clean: bool,
    /// A leaf was in use: whoever waited behind us gets by before we lock the next one.
    gave_way: bool,
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
            archived: BTreeMap::new(),
            whole_walk_due: now,
            whole_walk_began: None,
            due: now,
            is_clean: true,
            gave_way: false,
        }
    }

    /// The steps that are due, for a short while, which ends at `until` at the latest, but one in any case. True: a round is
    /// over, and each of its steps has worked.
    pub async fn work(&mut self, shared: &Shared, link: &Link, (me, term): (i64, i64), until: Instant) -> Result<bool> {
        let until = until.min(Instant::now() + if self.kept.archives() { ARCHIVE_SLICE } else { SLICE });
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
            if std::mem::take(&mut self.gave_way) || Instant::now() >= until {
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
                self.archived.retain(|leaf, _| self.leaves.contains(leaf));
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
                if carried > 0 {
                    Step::CarryDelayed(leaf)
                } else if self.kept.archived().is_some() {
                    Step::ArchiveLeaf(Walk::new(leaf, self.archived.get(&leaf).copied().unwrap_or(0)))
                } else {
                    Step::EmptyLeaf(leaf)
                }
            }
            Step::ArchiveLeaf(walk) => {
                let leaf = walk.leaf;
                let rules = self.kept.archived().unwrap_or_default();
                match walk_on(link, (me, term), walk, &rules, Some(false)).await? {
                    Some((walk, true)) => Step::ArchiveLeaf(walk),
                    Some((walk, false)) => {
                        self.archived.insert(leaf, walk.upto());
                        Step::EmptyLeaf(leaf)
                    }
                    None => Step::EmptyLeaf(leaf),
                }
            }
            Step::EmptyLeaf(leaf) => {
                self.try_to_empty(shared, link, (me, term), leaf).await?;
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
                if self.purge_dead(link, (me, term)).await? {
                    Step::PurgeDead
                } else {
                    Step::PurgeErrors(0)
                }
            }
            Step::PurgeErrors(after) => {
                let age = seconds(or_at_once(self.kept.rest.completed.time));
                let row = link.query_opt("purge_errors", &[&me, &term, &age, &after, &BATCH]).await?;
                match row.and_then(|r| r.get::<_, Option<i64>>("last_id")) {
                    Some(last) => Step::PurgeErrors(last),
                    None => Step::PurgeTokens(String::new(), String::new()),
                }
            }
            Step::PurgeTokens(kind, token) => {
                let age = seconds(self.kept.rest.completed.time.max(TOKEN_AGE));
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
            Step::MoveChunks(_) | Step::CarryDelayed(_) | Step::ArchiveLeaf(_) | Step::EmptyLeaf(_) => self.next_leaf(),
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
        if self.kept.short().is_some() { Step::ListUsedLeaves } else { Step::PurgeDead }
    }

    fn next_walk(&mut self) -> Step {
        if let Some(leaf) = self.leaves.pop() {
            let after = self.walked.get(&leaf).copied().unwrap_or(0);
            return Step::PurgeDone(Walk::new(leaf, after));
        }
        if let Some(began) = self.whole_walk_began.take() {
            let pause = WHOLE_WALK.max(self.kept.shortest() / WHOLE_WALK_SHARE).max(began.elapsed());
            self.whole_walk_due = Instant::now() + pause;
        }
        Step::PurgeDead
    }

    /// Answers whether there may be more.
    async fn purge_dead(&self, link: &Link, (me, term): (i64, i64)) -> Result<bool> {
        let (states, queues, times, archived) = self.kept.dead();
        if archived.contains(&true) {
            let values: [&(dyn ToSql + Sync); 7] = [&me, &term, &states, &queues, &times, &archived, &BATCH];
            return Ok(link.query_opt("archive_dead", &values).await?.is_some_and(|r| r.get("more")));
        }
        let row = link.query_opt("purge_dead", &[&me, &term, &states, &queues, &times, &BATCH]).await?;
        Ok(row.is_some_and(|r| r.get::<_, i64>(0) == BATCH))
    }

    async fn purge_done(&mut self, link: &Link, leader: (i64, i64), walk: Walk) -> Result<Step> {
        let Some(rules) = self.kept.short() else { return Ok(Step::PurgeDead) };
        let archives = rules.1.iter().zip(&rules.2).any(|(time, &is_archived)| is_archived && time.is_finite());
        let Some((walk, more)) = walk_on(link, leader, walk, &rules, archives.then_some(true)).await? else {
            return Ok(self.next_walk());
        };
        if more {
            return Ok(Step::PurgeDone(walk));
        }
        self.walked.insert(walk.leaf, walk.upto());
        Ok(self.next_walk())
    }

    async fn try_to_empty(&mut self, shared: &Shared, link: &Link, (me, term): (i64, i64), leaf: i16) -> Result<()> {
        match self.empty(shared, link, me, term, leaf).await {
            Ok(Freed::Yes) => {
                self.archived.remove(&leaf);
                shared.log(Level::Info, "leader", format!("emptied leaf {leaf}"));
            }
            Ok(Freed::NotArchived) => drop(self.archived.remove(&leaf)),
            Ok(Freed::No) => {}
            // Someone reads it, or still writes to it: again in the next round.
            Err(e) if e.sqlstate() == Some("55P03") => {
                shared.log(Level::Debug, "leader", format!("leaf {leaf} is in use: {e}"));
                self.gave_way = true;
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Empties a leaf of `task` and of `done` in one transaction, if nothing names it any more. Whoever reads a leaf waits for the end of its
    /// truncation, claims too: the commit is sent along with it, and what has to be durable with it is so before.
    async fn empty(&self, shared: &Shared, link: &Link, me: i64, term: i64, leaf: i16) -> Result<Freed> {
        Counters::add(&shared.counters.statements, 5);
        link.prepare_leaf("truncate_leaf", leaf).await?;
        link.batch("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = 'local'").await?;
        link.execute("flush_log", &[]).await?;
        link.batch("COMMIT").await?;
        link.batch(&format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
        let freed = self.lock_and_free(link, me, term, leaf).await;
        if !matches!(freed, Ok(Freed::Yes)) {
            link.batch("ROLLBACK").await?;
            return freed;
        }
        let (truncated, committed) = tokio::join!(link.execute_leaf("truncate_leaf", leaf), link.batch("COMMIT"));
        truncated?;
        committed?;
        Ok(Freed::Yes)
    }

    async fn lock_and_free(&self, link: &Link, me: i64, term: i64, leaf: i16) -> Result<Freed> {
        link.execute_leaf("lock_leaf", leaf).await?;
        let row = link.query_opt("check_leaf_empty", &[&me, &term, &leaf, &seconds(self.kept.leaf())]).await?;
        if !row.is_some_and(|r| r.get(0)) {
            return Ok(Freed::No);
        }
        if let Some((queues, _, archived)) = self.kept.archived() {
            let row = link.query_opt("check_leaf_archived", &[&leaf, &queues, &archived]).await?;
            if !row.is_some_and(|r| r.get(0)) {
                return Ok(Freed::NotArchived);
            }
        }
        link.execute("free_leaf", &[&leaf]).await?;
        Ok(Freed::Yes)
    }
}

/// The next step of a walk, by `archive_done` or `purge_done`, and whether there are more. `archive`: whether the contents of what is
/// archived are deleted, too, since the leaf stays; None: nothing is archived. None: no more is to be done by us.
async fn walk_on(
    link: &Link,
    (me, term): (i64, i64),
    mut walk: Walk,
    (queues, times, archived): &DoneRules,
    archive: Option<bool>,
) -> Result<Option<(Walk, bool)>> {
    let values: [&(dyn ToSql + Sync); 7] = [&me, &term, &walk.leaf, queues, times, &BATCH, &walk.after];
    let row = if let Some(deletes) = archive {
        let more: [&(dyn ToSql + Sync); 2] = [archived, &deletes];
        link.query_opt("archive_done", &[values.as_slice(), &more].concat()).await?
    } else {
        link.query_opt("purge_done", &values).await?
    };
    let Some(row) = row else { return Ok(None) };
    walk.after = row.get::<_, Option<i64>>("last_id").unwrap_or(walk.after);
    walk.first_kept = walk.first_kept.or(row.get("first_kept"));
    Ok(Some((walk, row.get("more"))))
}
