//! The completer: stores what became of tasks. It never drops a result: it keeps trying through an outage, and looks up what is in doubt.

mod flush;
mod tx;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::engine::connect::{Backoff, Link, Target};
use crate::engine::consume::books::Books;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::task::{Failure, Outcome};
use crate::engine::consume::trouble::{Named, Trouble, some_of};
use crate::engine::consume::{Phase, Shared};
use crate::engine::error::{Error, Result};
use crate::engine::logs::Level;
use crate::engine::wire::IdSet;
use flush::{Flush, Part, Sets};
use tx::Undecided;

/// Outcomes in one statement, at most.
const FLUSH: usize = 1_000;
/// After a flush of at least this many, the next one gathers for a moment: under load a flush of hundreds costs what one of ten does.
const BUSY: usize = 48;
/// That moment, counted from the start of the flush before.
const GATHER: Duration = Duration::from_millis(5);
/// Until a result that could not be stored is tried again.
const PARKED: Duration = Duration::from_secs(30);
/// How the error of such a result begins.
const PLAIN: &str = "its failure could not be stored";
/// An abandoned engine goes on trying to store what it has for this share of its last time; the rest is for signing off.
const LAST_TRIES: f64 = 0.5;

/// See the module.
pub struct Completer<'a> {
    shared: &'a Shared,
    target: Target,
    books: Rc<RefCell<Books>>,
    link: Option<Link>,
    connected_before: bool,
    /// What is being stored, by registration; the last first.
    todo: Vec<(u32, Flush)>,
    parked: Vec<(Instant, u32, Flush)>,
    /// What waits for the ends of handlers' transactions.
    undecided: Vec<Undecided>,
    /// Until then nothing is tried about those, after a failure.
    tx_at: Instant,
    tx_backoff: Backoff,
    /// Tasks whose results could not be stored and that were named.
    named: Named,
    trouble: Trouble,
}

impl<'a> Completer<'a> {
    /// Not yet connected.
    pub fn new(shared: &'a Shared, target: Target, books: Rc<RefCell<Books>>) -> Self {
        Self {
            shared,
            target,
            books,
            link: None,
            connected_before: false,
            todo: Vec::new(),
            parked: Vec::new(),
            undecided: Vec::new(),
            tx_at: Instant::now(),
            tx_backoff: Backoff::default(),
            named: Named::default(),
            trouble: Trouble::new("completer"),
        }
    }

    /// Stores outcomes until the engine has stopped, no handler runs, and nothing is left; or until an abandoned one is out of time.
    pub async fn run(mut self) {
        let shared = self.shared;
        let is_cut = tokio::select! {
            () = self.work() => false,
            () = shared.out_of_time(LAST_TRIES) => true,
        };
        shared.tx.close();
        if is_cut {
            self.name_undecided();
            self.name_what_is_lost();
        }
        self.books.borrow_mut().completer_ended = true;
        self.shared.control_news.notify_one();
    }

    async fn work(&mut self) {
        let mut last = (Instant::now(), 0);
        loop {
            if !self.parked.is_empty() {
                self.retry_parked().await;
            }
            if self.has_tx_work() {
                self.serve_tx().await;
            }
            let mut ended = self.shared.outcomes.take(FLUSH);
            self.divert(&mut ended);
            if ended.is_empty() {
                if self.is_finished() {
                    return;
                }
                let stopping = self.shared.phase() >= Phase::Stopping;
                let limit = if stopping { Duration::from_millis(20) } else { PARKED };
                let news = async {
                    tokio::select! {
                        () = self.shared.outcomes.wait() => {}
                        () = self.shared.tx.news.notified() => {}
                    }
                };
                drop(timeout(self.until_tx_work(limit), news).await);
                if last.1 >= BUSY && !stopping {
                    self.gather(last.0).await;
                }
                continue;
            }
            last = (Instant::now(), ended.len());
            let mut flushes: BTreeMap<u32, Flush> = BTreeMap::new();
            let (count, bytes) = (ended.len(), ended.iter().map(Ended::bytes).sum());
            for one in ended {
                if matches!(one.outcome, Outcome::Dropped) {
                    self.books.borrow_mut().settle(one.holder.epoch, one.holder.no, 1);
                    continue;
                }
                let epoch = one.holder.epoch;
                let flush = flushes.entry(epoch).or_default();
                flush.add(one);
                if flush.is_full() {
                    self.todo.push((epoch, std::mem::take(flush)));
                }
            }
            self.todo.extend(flushes.into_iter().rev().filter(|(_, flush)| flush.count > 0));
            self.store().await;
            self.shared.outcomes.flushed(count, bytes);
            if last.1 >= BUSY && self.shared.outcomes.len() < FLUSH / 2 && self.shared.phase() == Phase::Running {
                self.gather(last.0).await;
            }
        }
    }

    /// Out of time: says whose results are not stored. Some of them may be, if only the answer was lost.
    fn name_what_is_lost(&mut self) {
        let parked = std::mem::take(&mut self.parked).into_iter().map(|(_, _, flush)| flush);
        let todo = std::mem::take(&mut self.todo).into_iter().map(|(_, flush)| flush);
        let unstored = todo.chain(parked).flat_map(Flush::into_members).chain(self.shared.outcomes.take(usize::MAX));
        let results = unstored.filter(|e| e.outcome.is_result());
        let ids: Vec<i64> = results.map(|e| e.holder.id).collect();
        if !ids.is_empty() {
            let message = format!(
                "gives up {} results that could not be stored in time: their tasks will run again (ids {})",
                ids.len(),
                some_of(&ids)
            );
            self.shared.log(Level::Error, "completer", message);
        }
    }

    /// Waits until enough has come together, or the moment since `began` is over.
    async fn gather(&self, began: Instant) {
        let until = began + GATHER;
        while self.shared.outcomes.len() < FLUSH / 2 && Instant::now() < until && self.shared.phase() == Phase::Running
        {
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn is_finished(&self) -> bool {
        let stopped = match self.shared.phase() {
            Phase::Stopping => self.shared.running() == 0 && self.shared.expiring.load(Ordering::Acquire) == 0,
            Phase::Abandoned | Phase::Ended => true,
            Phase::New | Phase::Running => false,
        };
        stopped && self.books.borrow().claimer_ended && self.shared.outcomes.unflushed() == 0
    }

    /// Stores all of `todo`, however long it takes.
    async fn store(&mut self) {
        let mut backoff = Backoff::default();
        while let Some(&(epoch, _)) = self.todo.last() {
            let me = self.books.borrow().epochs.get(epoch as usize).copied().unwrap_or(0);
            match self.send_last(me).await {
                Ok(refused) => {
                    self.trouble.end(self.shared, "stores results again");
                    backoff.reset();
                    if let Some((_, flush)) = self.todo.pop() {
                        self.settle(epoch, me, &flush, refused).await;
                    }
                }
                Err(e) if e.is_data_fault() => {
                    let Some((_, mut flush)) = self.todo.pop() else { return };
                    // The other statements of the flight may have been stored.
                    flush.in_doubt = true;
                    if flush.count > 1 {
                        let (a, b) = flush.split();
                        self.todo.push((epoch, b));
                        self.todo.push((epoch, a));
                    } else {
                        self.give_up(epoch, flush, &e);
                    }
                }
                Err(e) => {
                    let count = self.shared.outcomes.unflushed();
                    self.trouble.note(self.shared, &e, format!("can't store {count} results, and keeps trying: {e}"));
                    if let (Some((_, flush)), true) = (self.todo.last_mut(), self.link.is_some()) {
                        flush.in_doubt = true;
                    }
                    if e.is_lost() {
                        self.link = None;
                    }
                    sleep(backoff.delay()).await;
                }
            }
        }
    }

    /// One member alone that its statement fails for: named, and stored in the plainest form; if even that fails it is tried again each
    /// half minute, and once more at the end.
    fn give_up(&mut self, epoch: u32, flush: Flush, error: &Error) {
        let code = error.sqlstate().unwrap_or_default().to_owned();
        let in_doubt = flush.in_doubt;
        for member in flush.into_members() {
            let id = member.holder.id;
            let (plain, delay) = match &member.outcome {
                Outcome::Completed => (format!("its completion could not be stored: SQLSTATE {code}"), None),
                Outcome::Returned(_) => (format!("its result could not be stored: SQLSTATE {code}"), None),
                Outcome::Failed(f) if f.error.starts_with(PLAIN) => (String::new(), f.delay),
                Outcome::Failed(f) => (format!("{PLAIN}: SQLSTATE {code}"), f.delay),
                Outcome::Snoozed(delay) => (format!("its snooze could not be stored: SQLSTATE {code}"), Some(*delay)),
                Outcome::Expired | Outcome::GivenBack | Outcome::Dropped => (String::new(), None),
            };
            let level = self.named.level(id);
            self.shared.log(level, "completer", format!("the result of task {id} can't be stored: {error}"));
            let mut one = Flush { in_doubt, ..Flush::default() };
            if plain.is_empty() {
                let is_result = member.outcome.is_result();
                one.add(member);
                if self.shared.phase() == Phase::Running {
                    self.parked.push((Instant::now() + PARKED, epoch, one));
                } else if is_result {
                    let message = format!("gives up the result of task {id}, which can't be stored: it will run again");
                    self.shared.log(Level::Error, "completer", message);
                }
            } else {
                let failure = Failure { delay, error: plain, traceback: String::new() };
                one.add(Ended { outcome: Outcome::Failed(Box::new(failure)), ..member });
                self.todo.push((epoch, one));
            }
        }
    }

    /// Results that could not be stored and are to be tried again.
    async fn retry_parked(&mut self) {
        let all = self.shared.phase() >= Phase::Stopping;
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.parked).into_iter().partition(|(at, ..)| all || *at <= now);
        self.parked = later;
        self.todo.extend(due.into_iter().map(|(_, epoch, flush)| (epoch, flush)));
        self.store().await;
    }

    async fn connect(&mut self) -> Result<&Link> {
        if self.link.as_ref().is_none_or(Link::is_closed) {
            let link = self.target.connect(true).await?;
            if self.connected_before {
                Counters::add(&self.shared.counters.reconnects, 1);
            }
            self.connected_before = true;
            self.link = Some(link);
        }
        self.link.as_ref().ok_or_else(|| Error::lost("not connected"))
    }

    /// Sends the statements of the last of `todo` in one flight; answers what the claims no longer hold.
    async fn send_last(&mut self, me: i64) -> Result<Vec<(Part, i64, IdSet)>> {
        self.connect().await?;
        let (Some(link), Some((epoch, flush))) = (&self.link, self.todo.last()) else { return Ok(Vec::new()) };
        if let Some((no, id, took_us)) = flush.single() {
            let is_last = self.books.borrow().held.get(&(*epoch, no)) == Some(&1);
            if is_last {
                let stored = link.execute("complete_task", &[&me, &no, &id, &took_us]).await?;
                Counters::add(&self.shared.counters.statements, 1);
                if stored == 1 {
                    Counters::add(&self.shared.counters.flushes, 1);
                    return Ok(Vec::new());
                }
            }
        }
        let completed = async {
            if flush.completed.is_empty() {
                return Ok(Vec::new());
            }
            let mut sets = Sets::default();
            for (no, members) in &flush.completed {
                sets.add(*no, members);
            }
            let Sets { nos, ids, piece_nos, pieces, times } = &sets;
            link.query("complete_tasks", &[&me, nos, ids, piece_nos, pieces, times]).await
        };
        let returned = async {
            if flush.returned.is_empty() {
                return Ok(Vec::new());
            }
            let mut sets = Sets::default();
            for (no, members) in &flush.returned {
                sets.add(*no, &members.iter().map(|m| (m.0, m.1)).collect::<Vec<_>>());
            }
            let Sets { nos, ids, piece_nos, pieces, times } = &sets;
            let all = || flush.returned.iter().flat_map(|(no, members)| members.iter().map(move |m| (*no, m.0, &m.2)));
            let value_ids: Vec<i64> = all().map(|r| r.1).collect();
            let value_nos: Vec<i64> = all().map(|r| r.0).collect();
            let seconds: Vec<f64> = all().map(|r| r.2.seconds).collect();
            let formats: Vec<&str> = all().map(|r| if r.2.is_json { "j" } else { "b" }).collect();
            let values: Vec<&[u8]> = all().map(|r| r.2.value.as_slice()).collect();
            link.query(
                "complete_with_results",
                &[&me, nos, ids, piece_nos, pieces, times, &value_ids, &value_nos, &seconds, &formats, &values],
            )
            .await
        };
        let failed = async {
            if flush.failed.is_empty() {
                return Ok(Vec::new());
            }
            let nos: Vec<i64> = flush.failed.iter().map(|f| f.0).collect();
            let ids: Vec<i64> = flush.failed.iter().map(|f| f.1).collect();
            let delays: Vec<Option<f64>> = flush.failed.iter().map(|f| f.2.delay).collect();
            let errors: Vec<&str> = flush.failed.iter().map(|f| f.2.error.as_str()).collect();
            let traces: Vec<&str> = flush.failed.iter().map(|f| f.2.traceback.as_str()).collect();
            let times: Vec<i64> = flush.failed.iter().map(|f| i64::from(f.3)).collect();
            link.query("fail_tasks", &[&me, &nos, &ids, &delays, &errors, &traces, &times]).await
        };
        let snoozed = async {
            if flush.snoozed.is_empty() {
                return Ok(Vec::new());
            }
            let nos: Vec<i64> = flush.snoozed.iter().map(|s| s.0).collect();
            let ids: Vec<i64> = flush.snoozed.iter().map(|s| s.1).collect();
            let delays: Vec<f64> = flush.snoozed.iter().map(|s| s.2).collect();
            link.query("snooze_tasks", &[&me, &nos, &ids, &delays]).await
        };
        let expired = async {
            if flush.expired.is_empty() {
                return Ok(Vec::new());
            }
            let (nos, ids): (Vec<i64>, Vec<i64>) = flush.expired.iter().copied().unzip();
            link.query("expire_claimed", &[&me, &nos, &ids]).await
        };
        let given_back = async {
            if flush.given_back.is_empty() {
                return Ok(Vec::new());
            }
            let nos: Vec<i64> = flush.given_back.keys().copied().collect();
            let sets: Vec<IdSet> = flush.given_back.values().map(|ids| IdSet::from_ids(&mut ids.clone())).collect();
            link.query("give_back_tasks", &[&me, &nos, &sets]).await
        };
        let (completed, returned, failed, snoozed, expired, given_back) =
            tokio::try_join!(completed, returned, failed, snoozed, expired, given_back)?;
        let sent = usize::from(!flush.completed.is_empty())
            + usize::from(!flush.returned.is_empty())
            + usize::from(!flush.failed.is_empty())
            + usize::from(!flush.snoozed.is_empty())
            + usize::from(!flush.expired.is_empty())
            + usize::from(!flush.given_back.is_empty());
        Counters::add(&self.shared.counters.flushes, 1);
        Counters::add(&self.shared.counters.statements, sent);
        let mut refused: Vec<(Part, i64, IdSet)> = Vec::new();
        refused.extend(completed.iter().chain(&returned).map(|r| (Part::Completed, r.get(0), r.get(1))));
        refused.extend(failed.iter().map(|r| (Part::Failed, r.get(0), IdSet::from_ids(&mut [r.get(1)]))));
        refused.extend(snoozed.iter().map(|r| (Part::Snoozed, r.get(0), IdSet::from_ids(&mut [r.get(1)]))));
        refused.extend(expired.iter().map(|r| (Part::Expired, r.get(0), IdSet::from_ids(&mut [r.get(1)]))));
        refused.extend(given_back.iter().map(|r| (Part::GivenBack, r.get(0), r.get(1))));
        Ok(refused)
    }

    /// Counts a stored flush; what was refused is logged, unless an earlier try whose answer was lost had stored it.
    async fn settle(&mut self, epoch: u32, me: i64, flush: &Flush, refused: Vec<(Part, i64, IdSet)>) {
        for (no, count) in flush.by_claim() {
            self.books.borrow_mut().settle(epoch, no, count);
        }
        let counters = &self.shared.counters;
        let lost = |part: Part| refused.iter().filter(|r| r.0 == part).map(|r| r.2.len()).sum::<u64>();
        let given_back: usize = flush.given_back.values().map(Vec::len).sum();
        let is_stored = |f: &&(i64, i64, Failure, u32)| {
            !refused.iter().any(|r| r.0 == Part::Failed && r.1 == f.0 && r.2.contains(f.1))
        };
        let stored: Vec<_> = flush.failed.iter().filter(is_stored).collect();
        let final_failures = stored.iter().filter(|f| f.2.delay.is_none()).count();
        counters.completed.fetch_add(flush.completions() as u64 - lost(Part::Completed), Ordering::Relaxed);
        counters.failed.fetch_add(final_failures as u64, Ordering::Relaxed);
        counters.retried.fetch_add((stored.len() - final_failures) as u64, Ordering::Relaxed);
        counters.snoozed.fetch_add(flush.snoozed.len() as u64 - lost(Part::Snoozed), Ordering::Relaxed);
        counters.expired.fetch_add(flush.expired.len() as u64 - lost(Part::Expired), Ordering::Relaxed);
        counters.given_back.fetch_add(given_back as u64 - lost(Part::GivenBack), Ordering::Relaxed);
        if refused.is_empty() {
            return;
        }
        // What could not be given back is another's by now, which is what giving back is for; nor was what expired a result.
        let results = refused.iter().filter(|r| !matches!(r.0, Part::Expired | Part::GivenBack));
        let mut gone: Vec<(i64, i64)> = results.flat_map(|(_, no, ids)| ids.iter().map(|id| (*no, id))).collect();
        if flush.in_doubt && !gone.is_empty() {
            let ours = self.find_ours_at_last(me, &gone).await;
            gone.retain(|g| !ours.contains(g));
            let counters = &self.shared.counters;
            for (no, id) in ours {
                let snoozed = flush.snoozed.iter().any(|s| s.0 == no && s.1 == id);
                match flush.failed.iter().find(|f| f.0 == no && f.1 == id) {
                    _ if snoozed => Counters::add(&counters.snoozed, 1),
                    Some(failed) if failed.2.delay.is_some() => Counters::add(&counters.retried, 1),
                    Some(_) => Counters::add(&counters.failed, 1),
                    None => Counters::add(&counters.completed, 1),
                }
            }
        }
        if gone.is_empty() {
            return;
        }
        Counters::add(&self.shared.counters.refused, gone.len());
        let ids: Vec<i64> = gone.iter().map(|g| g.1).collect();
        let message =
            format!("{} results were refused: the tasks are no longer ours (ids {})", ids.len(), some_of(&ids));
        self.shared.log(Level::Warning, "completer", message);
    }

    /// As `find_ours`, however long the answer takes: without it our own stored results would count as refused.
    async fn find_ours_at_last(&mut self, me: i64, gone: &[(i64, i64)]) -> Vec<(i64, i64)> {
        let mut backoff = Backoff::default();
        loop {
            match self.find_ours(me, gone).await {
                Ok(ours) => return ours,
                Err(e) => {
                    if e.is_lost() {
                        self.link = None;
                    }
                    self.trouble.note(self.shared, &e, format!("can't tell which results were stored before: {e}"));
                    sleep(backoff.delay()).await;
                }
            }
        }
    }

    async fn find_ours(&mut self, me: i64, gone: &[(i64, i64)]) -> Result<Vec<(i64, i64)>> {
        let nos: Vec<i64> = gone.iter().map(|g| g.0).collect();
        let ids: Vec<i64> = gone.iter().map(|g| g.1).collect();
        let rows = self.connect().await?.query("find_ended_tasks", &[&me, &nos, &ids]).await?;
        Ok(rows.iter().map(|r| (r.get(0), r.get(1))).collect())
    }
}
