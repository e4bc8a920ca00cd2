//! The claimer: takes tasks from the lanes of our types, just ahead of what the handlers use up.

mod answer;
mod careful;
mod culprit;
mod order;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout_at};

use crate::engine::connect::{Backoff, Link, Target};
use crate::engine::consume::books::Books;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::sched::{Kind, Wants, kind_of};
use crate::engine::consume::task::{Chunk, Holder};
use crate::engine::consume::trouble::Trouble;
use crate::engine::consume::{Phase, Shared};
use crate::engine::error::Result;

use careful::HOLD;
use culprit::Search;
use order::Order;

/// Payload of one claim, at most.
const CLAIM_BYTES: usize = 8 << 20;
/// Chunks of one lane that a claim locks at first; doubled while claims come short.
const FEWEST_CHUNKS: i64 = 2;
/// And at most: a row each even when tasks came one by one.
const MOST_CHUNKS: i64 = 1_000;
/// A sweep is not repeated before this many times its own duration: an empty lane under a held snapshot is always short.
const SWEEP_SHARE: u32 = 20;
/// A claim that came short beside others who hold rows is tried again after this.
const SOON: Duration = Duration::from_millis(2);
/// Claims of a few slow tasks are this far apart, so that slots that come free together are filled together.
const TRICKLE: Duration = Duration::from_millis(4);
/// Outcomes not yet stored, beyond which nothing more is claimed.
const MOST_UNFLUSHED: usize = 5_000;
/// Nor while they hold more bytes of results than this.
const MOST_UNFLUSHED_BYTES: usize = 64 << 20;

#[derive(Debug)]
struct Lane {
    id: i32,
    kind: usize,
    /// Its type: the kind's, or one that begins with it.
    name: Arc<str>,
    queue: Arc<str>,
    priority: i16,
    /// Of tracks 0 and 1: the `rid` up to which all was taken.
    hints: [i64; 2],
    /// Chunks to lock in one claim.
    chunks: i64,
    /// There may be more than the last claim took.
    maybe: bool,
    /// It is known to: what is below it in its queue waits.
    more: bool,
    /// A notification said so, and no claim has looked since.
    told: bool,
}

/// One row of a claim's request.
#[derive(Debug, Default)]
struct Asked {
    lanes: Vec<i32>,
    tracks: Vec<i16>,
    hints: Vec<i64>,
    groups: Vec<i32>,
    wants: Vec<i64>,
    chunks: Vec<i64>,
    /// Tasks, bytes and chunks in all.
    tasks: i64,
    bytes: i64,
    limit: i64,
    /// Lanes are left out for what waits above them.
    is_held: bool,
}

impl Asked {
    fn push(&mut self, lane: &Lane, track: i16, hint: i64, group: usize, want: usize, chunks: i64) {
        let want = i64::try_from(want).unwrap_or(i64::MAX);
        self.lanes.push(lane.id);
        self.tracks.push(track);
        self.hints.push(hint);
        self.groups.push(i32::try_from(group).unwrap_or(i32::MAX));
        self.wants.push(want);
        self.chunks.push(chunks.min(want));
    }

    /// It can bring one task at most.
    fn is_single(&self) -> bool {
        let is_one_group = self.groups.iter().all(|group| *group == self.groups[0]);
        self.tasks == 1 || (is_one_group && self.wants.first() == Some(&1))
    }
}

/// What a claim brought.
#[derive(Debug, Default)]
struct Brought {
    tasks: usize,
    /// By lane and track: chunks and tasks taken, and the `rid` up to which all was taken.
    lanes: HashMap<(i32, i16), (i64, i64, i64)>,
}

/// See the module.
pub struct Claimer<'a> {
    shared: &'a Shared,
    target: Target,
    books: Rc<RefCell<Books>>,
    link: Option<Link>,
    lanes: Vec<Lane>,
    stale: bool,
    /// Where the content of the last claim lay.
    leaf: i16,
    /// Lanes that were named to us and are of types that we have no handler for.
    foreign: HashSet<i32>,
    order: Order,
    /// When the last look at all lanes from their start began, and how long it took.
    swept: Option<Instant>,
    sweep_time: Duration,
    /// A claim came short: what it could not see is looked for.
    sweep_wanted: bool,
    last_claim: Instant,
    hold: Duration,
    hold_after: Instant,
    careful_trouble: Trouble,
    search: Search,
}

impl<'a> Claimer<'a> {
    /// Not yet connected.
    pub fn new(shared: &'a Shared, target: Target, books: Rc<RefCell<Books>>) -> Self {
        let now = Instant::now();
        Self {
            shared,
            target,
            books,
            link: None,
            lanes: Vec::new(),
            stale: true,
            leaf: 0,
            foreign: HashSet::new(),
            order: Order::new(shared.settings.ageing),
            swept: None,
            sweep_time: Duration::ZERO,
            sweep_wanted: false,
            last_claim: now,
            hold: HOLD.0,
            hold_after: now,
            careful_trouble: Trouble::new("claimer"),
            search: Search::new(),
        }
    }

    /// Claims until the engine stops.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut trouble = Trouble::new("claimer");
        let shared = self.shared;
        while shared.phase() == Phase::Running {
            let stepped = tokio::select! {
                stepped = self.step() => stepped,
                // A database that does not answer must not keep an abandoned engine: a claim under way is left to the rescuer.
                () = shared.out_of_time(0.0) => break,
            };
            match stepped {
                Ok(true) => {
                    backoff.reset();
                    trouble.end(shared, "claims again");
                }
                // It only waited, which says nothing of the database.
                Ok(false) => {}
                Err(e) => {
                    trouble.note(shared, &e, format!("can't claim, and keeps trying: {e}"));
                    self.books.borrow_mut().claiming_after = None;
                    if e.is_lost() {
                        self.link = None;
                    }
                    self.pause(backoff.delay()).await;
                }
            }
        }
        self.books.borrow_mut().claimer_ended = true;
        self.shared.outcomes.wake();
    }

    async fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while self.shared.phase() == Phase::Running && Instant::now() < until {
            drop(timeout_at(until.into(), self.shared.claim_news.notified()).await);
        }
    }

    /// One claim, or one wait. True: the database answered.
    async fn step(&mut self) -> Result<bool> {
        if self.link.is_none() {
            let link = self.target.connect(false).await?;
            if self.swept.is_some() {
                Counters::add(&self.shared.counters.reconnects, 1);
            }
            for lane in &mut self.lanes {
                lane.hints = [0; 2];
            }
            self.swept = None;
            self.link = Some(link);
        }
        self.hear();
        if self.stale {
            self.list_lanes().await?;
        }
        let now = Instant::now();
        let outcomes = &self.shared.outcomes;
        let is_full = outcomes.unflushed() > MOST_UNFLUSHED || outcomes.unflushed_bytes() > MOST_UNFLUSHED_BYTES;
        if is_full || !self.shared.may_start(Moment::now()) {
            self.pause(SOON).await;
            return Ok(false);
        }
        let answered = match self.claim_careful().await {
            Ok(answered) => {
                if answered {
                    self.careful_trouble.end(self.shared, "claims tasks that were lost before again");
                }
                answered
            }
            Err(e) if e.is_lost() => return Err(e),
            // A task that must run alone and can't be claimed keeps no other from being.
            Err(e) => {
                self.books.borrow_mut().claiming_after = None;
                let message = format!("can't claim tasks that were lost before, and keeps trying: {e}");
                self.careful_trouble.note(self.shared, &e, message);
                false
            }
        };
        let careful_due = if self.books.borrow().careful_lanes.is_empty() { None } else { Some(now + TRICKLE) };
        let poll = self.shared.settings.poll_interval.max(self.sweep_time * SWEEP_SHARE);
        let poll_due = self.swept.map_or(now, |s| s + poll);
        let sweep_due = self.swept.map_or(now, |s| s + (self.sweep_time * SWEEP_SHARE).max(SOON));
        let sweep = now >= poll_due || (self.sweep_wanted && now >= sweep_due);
        if !sweep && !self.lanes.iter().any(|l| l.maybe) {
            let until = if self.sweep_wanted { sweep_due.min(poll_due) } else { poll_due };
            let until = careful_due.map_or(until, |due| due.min(until));
            drop(timeout_at(until.into(), self.shared.claim_news.notified()).await);
            return Ok(answered);
        }
        // From here on, room that comes up while we look is told.
        self.shared.hungry.store(true, Ordering::Release);
        let wants = self.shared.sched.lock().wants(self.shared.round_trip());
        let few = wants.types.iter().all(|w| w.slow && w.tasks < 8);
        if wants.types.is_empty() {
            // Full. Handlers that end wake us; lanes that wait are looked at then.
            if sweep {
                self.swept = Some(now);
                self.lanes.iter_mut().for_each(|l| l.maybe = true);
            }
            let until = careful_due.unwrap_or(now + self.shared.settings.poll_interval);
            drop(timeout_at(until.into(), self.shared.claim_news.notified()).await);
            return Ok(answered);
        }
        self.shared.hungry.store(false, Ordering::Release);
        if few && !sweep && now < self.last_claim + TRICKLE {
            self.pause_until(self.last_claim + TRICKLE).await;
            return Ok(answered);
        }
        self.claim_ordinary(&wants, sweep).await
    }

    async fn pause_until(&self, until: Instant) {
        tokio::time::sleep_until(until.into()).await;
    }

    /// Takes in what the control loop has heard.
    fn hear(&mut self) {
        let mut books = self.books.borrow_mut();
        for id in std::mem::take(&mut books.notified) {
            if let Some(lane) = self.lanes.iter_mut().find(|l| l.id == id) {
                (lane.maybe, lane.told) = (true, true);
            } else if self.foreign.insert(id) {
                // New, or of a type that isn't ours: asked for once.
                self.stale = true;
            }
        }
        self.stale |= std::mem::take(&mut books.lanes_changed);
    }

    async fn list_lanes(&mut self) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        let kinds = &self.shared.settings.kinds;
        let names: Vec<&str> = kinds.iter().filter(|k| k.prefix().is_none()).map(|k| k.name.as_str()).collect();
        let prefixes: Vec<&str> = kinds.iter().filter_map(Kind::prefix).collect();
        let rows = link.query("list_lanes", &[&names, &self.shared.settings.queues, &prefixes]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        let mut lanes = Vec::with_capacity(rows.len());
        for row in rows {
            let (id, name, queue, priority): (i32, &str, &str, i16) = (row.get(0), row.get(1), row.get(2), row.get(3));
            let Some(kind) = kind_of(kinds, name) else { continue };
            let old = self.lanes.iter().find(|l| l.id == id);
            let (hints, chunks, more) = old.map_or(([0; 2], FEWEST_CHUNKS, true), |l| (l.hints, l.chunks, l.more));
            let (name, queue) = (Arc::from(name), Arc::from(queue));
            lanes.push(Lane { id, kind, name, queue, priority, hints, chunks, maybe: true, more, told: false });
        }
        self.order.sort(&lanes);
        self.lanes = lanes;
        self.stale = false;
        Ok(())
    }

    async fn claim_ordinary(&mut self, wants: &Wants, sweep: bool) -> Result<bool> {
        let plan = self.order.next(sweep);
        let mut asked = self.ask(wants, plan, CLAIM_BYTES);
        if asked.lanes.is_empty() {
            if sweep {
                self.swept = Some(Instant::now());
                self.sweep_wanted = false;
            } else {
                if asked.is_held {
                    // A type that waits for those above always wants something: each batch would wake us.
                    sleep(SOON / 2).await;
                }
                // What may hold more is of types that want nothing now; looked at again after `hungry` is up, so that no wake-up is lost.
                self.shared.hungry.store(true, Ordering::Release);
                let again = self.shared.sched.lock().wants(self.shared.round_trip());
                if self.ask(&again, plan, CLAIM_BYTES).lanes.is_empty() {
                    let limit = Instant::now() + self.shared.settings.poll_interval;
                    drop(timeout_at(limit.into(), self.shared.claim_news.notified()).await);
                }
            }
            return Ok(false);
        }
        let began = Instant::now();
        let Some(brought) = self.claim_or_search(&mut asked).await? else {
            // What these lanes hold is still there.
            self.sweep_wanted |= sweep;
            return Ok(true);
        };
        if sweep {
            self.swept = Some(began);
            self.sweep_time = began.elapsed();
        }
        self.order.note(plan, began);
        self.judge(&asked, &brought, sweep);
        if asked.is_held && saturating(brought.tasks) < asked.tasks {
            // What was left out need not wait until slots come together.
            self.last_claim = began.checked_sub(TRICKLE).unwrap_or(began);
        }
        Ok(true)
    }

    /// Which lanes may hold more, and how many chunks to lock next time.
    fn judge(&mut self, asked: &Asked, brought: &Brought, sweep: bool) {
        let of = |i: usize| brought.lanes.get(&(asked.lanes[i], asked.tracks[i])).copied().unwrap_or_default();
        let (mut groups, mut chunks_in_all): (HashMap<i32, i64>, i64) = (HashMap::new(), 0);
        for i in 0..asked.lanes.len() {
            let (chunks, tasks, _) = of(i);
            *groups.entry(asked.groups[i]).or_default() += tasks;
            chunks_in_all += chunks;
        }
        // The claim ended before it had seen all of every lane.
        let cut = saturating(brought.tasks) >= asked.tasks || chunks_in_all >= asked.limit;
        // A lane ahead of what came last was seen to its end: by group, and in all.
        let (mut lasts, mut last): (HashMap<i32, usize>, usize) = (HashMap::new(), 0);
        for i in (0..asked.lanes.len()).filter(|&i| of(i).1 > 0) {
            lasts.insert(asked.groups[i], i);
            last = i;
        }
        let mut short = false;
        for lane in &mut self.lanes {
            let (mut seen, mut full, mut at_limit, mut taken, mut uptos) = (false, false, false, 0, Vec::new());
            let mut more = false;
            for i in (0..asked.lanes.len()).filter(|&i| asked.lanes[i] == lane.id) {
                seen = true;
                let (chunks, _, upto) = of(i);
                taken += chunks;
                at_limit |= chunks >= asked.chunks[i];
                let group_full = groups.get(&asked.groups[i]).is_some_and(|tasks| *tasks >= asked.wants[i]);
                full |= cut || group_full;
                let is_last = lasts.get(&asked.groups[i]).is_none_or(|&last| last <= i);
                more |= (cut && last <= i) || (group_full && is_last);
                uptos.push((asked.tracks[i], chunks, upto, asked.hints[i] == 0));
            }
            if !seen {
                continue;
            }
            lane.maybe = full || at_limit;
            lane.more = more || at_limit;
            // Told of something and found nothing: a row that another holds for a moment is not an empty lane.
            short |= !lane.maybe && (taken > 0 || lane.told);
            lane.told = false;
            for (track, chunks, upto, from_start) in uptos {
                let hint = &mut lane.hints[usize::from(track.unsigned_abs()) % 2];
                // A sweep that was cut short knows of rows behind the hint: there the next claim goes on.
                *hint = if from_start && lane.maybe && chunks > 0 { upto } else { upto.max(*hint) };
            }
            if at_limit && !full {
                lane.chunks = (lane.chunks * 2).min(MOST_CHUNKS);
            } else if full && taken > 0 && taken < lane.chunks / 2 {
                lane.chunks = (taken + 1).max(FEWEST_CHUNKS);
            }
        }
        // Short, and yet something came: a commit that overtook another, or rows that others hold, lie behind the hints.
        self.sweep_wanted = short || (self.sweep_wanted && !sweep);
    }

    /// Sends one claim and takes in what it brings.
    async fn claim(&mut self, asked: &Asked) -> Result<Brought> {
        let Some(link) = &self.link else { return Ok(Brought::default()) };
        let (me, epoch, after) = {
            let mut books = self.books.borrow_mut();
            let after = books.last_no;
            books.last_no += asked.limit + 1;
            books.claiming_after = Some(after);
            (books.me(), books.epoch(), after)
        };
        let sent = Instant::now();
        self.last_claim = sent;
        let rows = if asked.is_single() {
            let no = after + 1;
            link.query("claim_task", &[&me, &no, &asked.lanes, &asked.tracks, &asked.hints, &self.leaf]).await?
        } else {
            link.query(
                "claim_tasks",
                &[
                    &me,
                    &after,
                    &asked.tasks,
                    &asked.bytes,
                    &asked.lanes,
                    &asked.tracks,
                    &asked.hints,
                    &asked.groups,
                    &asked.wants,
                    &asked.chunks,
                    &asked.limit,
                ],
            )
            .await?
        };
        let time = u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mean = self.shared.round_trip_us.load(Ordering::Relaxed);
        self.shared.round_trip_us.store((mean * 7 + time.min(100_000)) / 8, Ordering::Relaxed);
        Counters::add(&self.shared.counters.claims, 1);
        Counters::add(&self.shared.counters.statements, 1);
        let mut brought = Brought::default();
        let mut chunks = Vec::with_capacity(rows.len());
        for row in &rows {
            let chunk = self.read(row, epoch, &mut brought).await?;
            chunks.push(Arc::new(chunk));
        }
        let current = {
            let mut books = self.books.borrow_mut();
            books.claiming_after = None;
            for chunk in &chunks {
                *books.held.entry((epoch, chunk.no)).or_default() += chunk.ids().len() as u64;
            }
            books.is_current(epoch)
        };
        Counters::add(&self.shared.counters.claimed, brought.tasks);
        if current {
            self.hand_over(&chunks);
        } else {
            // We were declared dead meanwhile: the rescuer has them, or will.
            self.books.borrow_mut().held.retain(|key, _| key.0 != epoch);
        }
        Ok(brought)
    }

    fn hand_over(&self, chunks: &[Arc<Chunk>]) {
        let mut sched = self.shared.sched.lock();
        let mut returned = Vec::new();
        for chunk in chunks {
            if !sched.push(chunk) {
                let give = |&id| Ended::given_back(Holder { epoch: chunk.epoch, no: chunk.no, id });
                returned.extend(chunk.ids().iter().map(give));
            }
        }
        drop(sched);
        self.shared.spread();
        self.shared.outcomes.append(&mut returned);
    }
}

fn saturating(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
