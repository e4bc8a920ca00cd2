//! Retention, the leader's slow work: opens the next leaf, empties old ones whole, forgets dead tasks, errors and tokens. One small step
//! a tick, so that heartbeat and rescue never wait for it.

use std::time::{Duration, Instant};

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
/// Delayed tasks, dead rows, errors or tokens that one statement moves or forgets.
const BATCH: i64 = 500;
/// Chunks that one statement moves to the open leaf, of up to 500 tasks each.
const CHUNKS: i64 = 20;
/// A leaf is open for this share of the retention, so that at most nine of sixteen are in use.
const LEAF_SHARE: u32 = 8;
/// A token is held while its task's content is kept anywhere, and this long at least, however soon its task is forgotten: a client that
/// sends the same request again some minutes later must meet the token. A failed task is found by its content in its leaf, too, so with
/// a `failed_retention` below the completed one its token goes when the leaf does.
const TOKEN_AGE: Duration = Duration::from_secs(3_600);
/// How long a leaf's lock is waited for: a reader's open transaction makes us give up, and claims wait no longer than this.
const LOCK_WAIT: &str = "50ms";

/// What comes next in a round.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    OpenLeaf,
    ListLeaves,
    MoveChunks(i16),
    CarryDelayed(i16),
    EmptyLeaf(i16),
    PurgeDead,
    PurgeErrors(i64),
    PurgeTokens(String, String),
}

/// See the module.
#[derive(Debug)]
pub struct Retention {
    completed: Duration,
    failed: Duration,
    step: Step,
    leaves: Vec<i16>,
    due: Instant,
    /// No step of this round has failed.
    is_clean: bool,
}

impl Retention {
    /// The first round comes at once.
    pub fn new(completed: Duration, failed: Duration) -> Self {
        Self { completed, failed, step: Step::OpenLeaf, leaves: Vec::new(), due: Instant::now(), is_clean: true }
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
        let kept = seconds(self.completed);
        self.step = match std::mem::replace(&mut self.step, Step::OpenLeaf) {
            Step::OpenLeaf => {
                let rows = link.query("open_leaf", &[&me, &term, &seconds(self.completed / LEAF_SHARE)]).await?;
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
            Step::PurgeDead => {
                let row = link.query_opt("purge_dead", &[&me, &term, &seconds(self.failed), &BATCH]).await?;
                let gone: i64 = row.map_or(0, |r| r.get(0));
                if gone == BATCH { Step::PurgeDead } else { Step::PurgeErrors(0) }
            }
            Step::PurgeErrors(after) => {
                let row = link.query_opt("purge_errors", &[&me, &term, &kept, &after, &BATCH]).await?;
                match row.and_then(|r| r.get::<_, Option<i64>>("last_id")) {
                    Some(last) => Step::PurgeErrors(last),
                    None => Step::PurgeTokens(String::new(), String::new()),
                }
            }
            Step::PurgeTokens(kind, token) => {
                let age = seconds(self.completed.max(TOKEN_AGE));
                let row = link.query_opt("purge_tokens", &[&me, &term, &age, &kind, &token, &BATCH]).await?;
                let last = row.and_then(|r| {
                    Some((r.get::<_, Option<String>>("last_type")?, r.get::<_, Option<String>>("last_token")?))
                });
                if let Some((kind, token)) = last {
                    Step::PurgeTokens(kind, token)
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
            Step::ListLeaves => Step::PurgeDead,
            Step::MoveChunks(_) | Step::CarryDelayed(_) | Step::EmptyLeaf(_) => self.next_leaf(),
            Step::PurgeDead => Step::PurgeErrors(0),
            Step::PurgeErrors(_) => Step::PurgeTokens(String::new(), String::new()),
            Step::PurgeTokens(..) => {
                self.is_clean = true;
                self.due = Instant::now() + self.round();
                Step::OpenLeaf
            }
        };
    }

    fn round(&self) -> Duration {
        (self.completed / ROUND_SHARE).clamp(ROUND.0, ROUND.1)
    }

    fn next_leaf(&mut self) -> Step {
        self.leaves.pop().map_or(Step::PurgeDead, Step::MoveChunks)
    }

    /// Empties a leaf of `task` and of `done` in one transaction, if nothing names it any more.
    async fn empty(&self, shared: &Shared, link: &Link, me: i64, term: i64, leaf: i16) -> Result<bool> {
        link.batch(&format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
        let emptied = self.empty_in_transaction(shared, link, me, term, leaf).await;
        link.batch(if matches!(emptied, Ok(true)) { "COMMIT" } else { "ROLLBACK" }).await?;
        emptied
    }

    async fn empty_in_transaction(&self, shared: &Shared, link: &Link, me: i64, term: i64, leaf: i16) -> Result<bool> {
        let lock = link.prepare_leaf("lock_leaf", leaf).await?;
        link.within(link.client.execute(&lock, &[])).await?;
        let row = link.query_opt("check_leaf_empty", &[&me, &term, &leaf, &seconds(self.completed)]).await?;
        if !row.is_some_and(|r| r.get(0)) {
            return Ok(false);
        }
        let truncate = link.prepare_leaf("truncate_leaf", leaf).await?;
        link.within(link.client.execute(&truncate, &[])).await?;
        link.execute("free_leaf", &[&leaf]).await?;
        Counters::add(&shared.counters.statements, 4);
        Ok(true)
    }
}
