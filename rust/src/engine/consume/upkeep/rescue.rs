//! The dead: they are declared so, their tasks are rescued, and at last they are forgotten. What a statement fails for is found by halves
//! and set aside for a minute, so that one bad row keeps nobody's tasks from running again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::Row;

use crate::engine::connect::Link;
use crate::engine::consume::Shared;
use crate::engine::consume::control::seconds;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::trouble::{Named, some_of};
use crate::engine::error::{Error, Result};
use crate::engine::logs::Level;
use crate::engine::wire::IdSet;

/// Claims in one rescue statement.
const RESCUE: i64 = 50;
/// Until a culprit is tried again.
const SET_ASIDE: Duration = Duration::from_secs(60);
/// The search for culprits goes on for this long in one tick: heartbeats come between.
const SLICE: Duration = Duration::from_millis(100);

/// What was rescued of one consumer.
#[derive(Debug, Default)]
struct Tally {
    host: Option<String>,
    pid: Option<i32>,
    stopping: bool,
    claims: i64,
    tasks: i64,
    charged: i64,
    failed: i64,
}

/// Tasks or consumers that a statement fails for, by id.
#[derive(Debug, Default)]
struct Aside {
    until: Vec<(Instant, i64)>,
    named: Named,
}

impl Aside {
    /// Sets these aside; of them, those that were not named before.
    fn add(&mut self, ids: &[i64]) -> Vec<i64> {
        let until = Instant::now() + SET_ASIDE;
        self.until.extend(ids.iter().map(|&id| (until, id)));
        ids.iter().copied().filter(|&id| self.named.add(id)).collect()
    }

    /// Those whose time is over, which are no longer set aside.
    fn due(&mut self) -> Vec<i64> {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.until).into_iter().partition(|(until, _)| *until <= now);
        self.until = later;
        due.into_iter().map(|(_, id): (Instant, i64)| id).collect()
    }

    fn ids(&self) -> Vec<i64> {
        self.until.iter().map(|(_, id)| *id).collect()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Rescuer {
    /// What failed together, in parts yet to be tried.
    todo: Vec<IdSet>,
    /// Those found by that, and the last one's error.
    found: (Vec<i64>, Option<Error>),
    tasks_aside: Aside,
    consumers_aside: Aside,
    /// Consumers that could not be declared dead together, yet to be tried one by one.
    singly: Vec<i64>,
    /// By consumer, until all of it is rescued: a line each.
    tallies: BTreeMap<i64, Tally>,
}

impl Rescuer {
    /// A step of what there is to do; `leader` is holder and term. It may take several statements, but begins none after `beat_at` save
    /// the first. True: there is more to do at once.
    pub(super) async fn work(
        &mut self,
        shared: &Shared,
        link: &Link,
        leader: (i64, i64),
        silent: &[i64],
        orphaned: bool,
        beat_at: Instant,
    ) -> Result<bool> {
        // Those whose minute is over are among the silent again by themselves.
        self.consumers_aside.due();
        let aside = self.consumers_aside.ids();
        let silent: Vec<i64> = silent.iter().copied().filter(|id| !aside.contains(id)).collect();
        if !silent.is_empty() {
            self.declare_dead(shared, link, leader, &silent, beat_at).await?;
            return Ok(true);
        }
        if orphaned && self.rescue(shared, link, leader, beat_at).await? {
            return Ok(true);
        }
        self.tell(shared);
        Ok(false)
    }

    /// Forgets the dead that hold nothing more.
    pub(super) async fn forget(shared: &Shared, link: &Link, (me, term): (i64, i64)) -> Result<bool> {
        Counters::add(&shared.counters.statements, 1);
        link.execute("forget_consumers", &[&me, &term]).await?;
        Ok(false)
    }

    /// Another leads, or we do again: what was begun is another's, and what was rescued is told.
    pub(super) fn start_over(&mut self, shared: &Shared) {
        self.tell(shared);
        self.todo.clear();
        self.singly.clear();
        self.found = (Vec::new(), None);
    }

    async fn declare_dead(
        &mut self,
        shared: &Shared,
        link: &Link,
        (me, term): (i64, i64),
        silent: &[i64],
        beat_at: Instant,
    ) -> Result<()> {
        let dead_after = seconds(shared.settings.dead_after);
        if self.singly.is_empty() {
            Counters::add(&shared.counters.statements, 1);
            match link.query("declare_dead", &[&me, &term, &dead_after, &silent]).await {
                Ok(rows) => tell_dead(shared, &rows),
                // One by one: dead consumers are few.
                Err(e) if e.is_data_fault() => self.singly = silent.to_vec(),
                Err(e) => return Err(e),
            }
            if Instant::now() >= beat_at {
                return Ok(());
            }
        }
        while let Some(id) = self.singly.pop() {
            Counters::add(&shared.counters.statements, 1);
            match link.query("declare_dead", &[&me, &term, &dead_after, &[id].as_slice()]).await {
                Ok(rows) => tell_dead(shared, &rows),
                Err(e) if e.is_data_fault() => {
                    if !self.consumers_aside.add(&[id]).is_empty() {
                        let message = format!("consumer {id} can't be declared dead, tried again each minute: {e}");
                        shared.log(Level::Error, "leader", message);
                    }
                }
                Err(e) => return Err(e),
            }
            if Instant::now() >= beat_at {
                break;
            }
        }
        Ok(())
    }

    /// Rescues one batch of claims; answers whether there was any.
    async fn rescue(&mut self, shared: &Shared, link: &Link, leader: (i64, i64), beat_at: Instant) -> Result<bool> {
        self.todo.extend(self.tasks_aside.due().into_iter().map(|id| IdSet::from_ids(&mut [id])));
        if !self.todo.is_empty() {
            self.search(shared, link, leader, beat_at).await?;
            return Ok(true);
        }
        let aside = IdSet::from_ids(&mut self.tasks_aside.ids());
        match send(shared, link, leader, None, &aside).await {
            Ok(rows) => {
                self.count(&rows);
                Ok(!rows.is_empty())
            }
            Err(e) if e.is_data_fault() => {
                let rows = link.query("list_lost_claims", &[&leader.0, &leader.1, &RESCUE, &aside]).await?;
                let sets = rows.iter().map(|row| row.get::<_, IdSet>(0));
                let mut ids: Vec<i64> = sets.flat_map(|set| set.iter().collect::<Vec<_>>()).collect();
                if ids.is_empty() {
                    return Err(e);
                }
                self.todo.push(IdSet::from_ids(&mut ids));
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }

    /// Tries parts, and halves of what fails, until each culprit is alone; the others are rescued on the way.
    async fn search(&mut self, shared: &Shared, link: &Link, leader: (i64, i64), beat_at: Instant) -> Result<()> {
        let until = beat_at.min(Instant::now() + SLICE);
        while let Some(part) = self.todo.pop() {
            match send(shared, link, leader, Some(&part), &IdSet::default()).await {
                Ok(rows) => self.count(&rows),
                Err(e) if e.is_data_fault() => {
                    let mut ids: Vec<i64> = part.iter().collect();
                    if ids.len() > 1 {
                        let mut late = ids.split_off(ids.len() / 2);
                        self.todo.push(IdSet::from_ids(&mut late));
                        self.todo.push(IdSet::from_ids(&mut ids));
                    } else {
                        self.found.0.extend(ids);
                        self.found.1 = Some(e);
                    }
                }
                Err(e) => {
                    self.todo.push(part);
                    return Err(e);
                }
            }
            if Instant::now() >= until {
                break;
            }
        }
        if !self.todo.is_empty() {
            return Ok(());
        }
        if let (found, Some(error)) = std::mem::take(&mut self.found) {
            let new = self.tasks_aside.add(&found);
            if !new.is_empty() {
                let message = format!(
                    "{} lost tasks can't be rescued, tried again each minute (ids {}): {error}",
                    new.len(),
                    some_of(&new)
                );
                shared.log(Level::Error, "leader", message);
            }
        }
        Ok(())
    }

    fn count(&mut self, rows: &[Row]) {
        for row in rows {
            let tally = self.tallies.entry(row.get(0)).or_default();
            tally.host = row.get(1);
            tally.pid = row.get(2);
            tally.claims += row.get::<_, i64>(3);
            tally.tasks += row.get::<_, i64>(4);
            tally.charged += row.get::<_, i64>(5);
            tally.failed += row.get::<_, i64>(6);
            tally.stopping = row.get(7);
        }
    }

    /// What was rescued, a line a consumer.
    fn tell(&mut self, shared: &Shared) {
        for (id, tally) in std::mem::take(&mut self.tallies) {
            let Tally { host, pid, stopping, claims, tasks, charged, failed } = tally;
            let (who, why) = match (pid, host) {
                (Some(pid), Some(host)) if stopping => {
                    (format!("process {pid} on {host} (consumer {id})"), "it stopped and left them")
                }
                (Some(pid), Some(host)) => (format!("process {pid} on {host} (consumer {id})"), "it was declared dead"),
                _ => (format!("consumer {id}, which is not known (any more)"), "nobody would end them"),
            };
            let message = format!(
                "rescued {tasks} tasks in {claims} claims of {who}, since {why}: {charged} were running and are charged ({failed} of them \
                 have failed for good), {} are not",
                tasks - charged
            );
            shared.log(Level::Warning, "leader", message);
        }
    }
}

fn tell_dead(shared: &Shared, rows: &[Row]) {
    for row in rows {
        let (id, host, pid, silent): (i64, &str, i32, f64) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let message = format!("process {pid} on {host} (consumer {id}) is dead: silent for {silent:.1} s");
        shared.log(Level::Warning, "leader", message);
    }
}

/// Rescues these tasks, or all but those set aside.
async fn send(
    shared: &Shared,
    link: &Link,
    (me, term): (i64, i64),
    these: Option<&IdSet>,
    aside: &IdSet,
) -> Result<Vec<Row>> {
    Counters::add(&shared.counters.statements, 1);
    link.query("rescue_claims", &[&me, &term, &RESCUE, &these, aside]).await
}
