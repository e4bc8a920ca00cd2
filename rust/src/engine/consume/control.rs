//! The control loop: hears notifications, beats, ticks; on the third connection.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout_at;

use crate::engine::connect::{Backoff, Link, Target, random_u64};
use crate::engine::consume::books::Books;
use crate::engine::consume::cancel::Cancels;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::task::Holder;
use crate::engine::consume::trouble::Trouble;
use crate::engine::consume::upkeep::Upkeep;
use crate::engine::consume::{Phase, Shared};
use crate::engine::error::Result;
use crate::engine::logs::Level;
use crate::engine::sql;
use crate::engine::wire::IdSet;

/// Registers this process anew: 63 random bits, so that no number is ever met twice.
pub async fn register(shared: &Shared, link: &Link) -> Result<i64> {
    let me = i64::try_from(random_u64() >> 1).unwrap_or(1).max(1);
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let types: Vec<&str> = shared.settings.kinds.iter().map(|k| k.name.as_str()).collect();
    let sent = Moment::now();
    link.execute(
        "register_consumer",
        &[&me, &pid, &host_name(), &env!("CARGO_PKG_VERSION"), &types, &shared.settings.queues],
    )
    .await?;
    Counters::add(&shared.counters.statements, 1);
    shared.beaten(sent);
    Ok(me)
}

const NOT_SIGNED_OFF: &str = "could not sign off; other workers will find out by the missing heartbeat";

/// The host's name, for people.
fn host_name() -> String {
    let from_file = std::fs::read_to_string("/etc/hostname").ok();
    let name = std::env::var("HOSTNAME").ok().or(from_file).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown".to_owned() } else { name.to_owned() }
}

/// See the module.
pub struct Control<'a> {
    shared: &'a Shared,
    target: Target,
    books: Rc<RefCell<Books>>,
    link: Option<Link>,
    notified: Option<mpsc::UnboundedReceiver<String>>,
    upkeep: Upkeep<'a>,
    upkeep_backoff: Backoff,
    upkeep_trouble: Trouble,
    lost_claims_trouble: Trouble,
    cancels: Cancels,
    has_told_of_pooler: bool,
    beat_at: Instant,
    tick_at: Instant,
}

/// Of an abandoned engine's last time: from here on the control loop no longer waits for a statement under way, or for the completer.
const LAST_STEPS: f64 = 0.6;

impl<'a> Control<'a> {
    /// On the connection that `start` made.
    pub fn new(shared: &'a Shared, target: Target, link: Link, books: Rc<RefCell<Books>>) -> Self {
        let now = Instant::now();
        let upkeep = Upkeep::new(shared, Rc::clone(&books));
        Self {
            shared,
            target,
            books,
            link: Some(link),
            notified: None,
            upkeep,
            upkeep_backoff: Backoff::default(),
            upkeep_trouble: Trouble::new("control"),
            lost_claims_trouble: Trouble::new("control"),
            cancels: Cancels::default(),
            has_told_of_pooler: false,
            beat_at: now + shared.settings.heartbeat_interval,
            tick_at: now,
        }
    }

    /// Runs until the completer has ended, then signs off; an abandoned engine does both in time, whatever the database does.
    pub async fn run(mut self) {
        let shared = self.shared;
        tokio::select! {
            () = self.work() => {}
            // A connection on which nothing comes back is of no use for signing off.
            () = shared.out_of_time(LAST_STEPS) => self.link = None,
        }
        tokio::select! {
            () = self.sign_off() => {}
            () = shared.out_of_time(1.0) => shared.log(Level::Warning, "control", NOT_SIGNED_OFF),
        }
    }

    async fn work(&mut self) {
        let mut backoff = Backoff::default();
        let mut trouble = Trouble::new("control");
        while !self.is_finished() {
            match self.step().await {
                Ok(()) => {
                    backoff.reset();
                    trouble.end(self.shared, "is connected again");
                }
                Err(e) => {
                    trouble.note(self.shared, &e, format!("heartbeat and upkeep fail, and keep trying: {e}"));
                    if e.is_lost() {
                        self.upkeep.lose_contact();
                        self.link = None;
                        self.notified = None;
                    }
                    let until = Instant::now() + backoff.delay();
                    drop(timeout_at(until.into(), self.shared.control_news.notified()).await);
                }
            }
        }
    }

    fn is_finished(&self) -> bool {
        self.shared.phase() >= Phase::Stopping && self.books.borrow().completer_ended
    }

    async fn step(&mut self) -> Result<()> {
        if self.link.as_ref().is_none_or(Link::is_closed) {
            self.notified = None;
            self.link = Some(self.target.connect(false).await?);
            Counters::add(&self.shared.counters.reconnects, 1);
            self.beat_at = Instant::now();
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        if self.shared.settings.listen && self.notified.is_none() && !link.is_pooled() {
            link.batch(&format!("LISTEN \"{}\"", sql::channel(&self.shared.settings.schema))).await?;
            self.notified = link.notified.take();
            Counters::add(&self.shared.counters.statements, 1);
        }
        if self.shared.settings.listen && link.is_pooled() && !self.has_told_of_pooler {
            self.has_told_of_pooler = true;
            let message = format!(
                "is connected through a pooler, which passes no notifications on: looks for new tasks every {:?}",
                self.shared.settings.poll_interval
            );
            self.shared.log(Level::Info, "control", message);
        }
        let now = Instant::now();
        if now >= self.beat_at {
            self.beat().await?;
            self.beat_at = now + self.shared.settings.heartbeat_interval;
        }
        if now >= self.tick_at {
            let Some(link) = &self.link else { return Ok(()) };
            match self.upkeep.tick(link, self.beat_at).await {
                Ok(next) => {
                    self.upkeep_backoff.reset();
                    self.upkeep_trouble.end(self.shared, "upkeep works again");
                    self.tick_at = now + next;
                }
                Err(e) if e.is_lost() => return Err(e),
                // A right that is missing, say: heartbeats go on all the same.
                Err(e) => {
                    self.upkeep_trouble.note(self.shared, &e, format!("upkeep fails, and is tried again: {e}"));
                    self.tick_at = now + self.upkeep_backoff.delay();
                }
            }
        }
        if let Some(link) = &self.link {
            self.cancels.look(self.shared, &self.books, link).await?;
        }
        let until = self.beat_at.min(self.tick_at).min(self.cancels.due_at);
        let heard = async {
            match &mut self.notified {
                Some(notified) => notified.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = timeout_at(until.into(), heard) => match heard {
                Ok(Some(lanes)) => self.hear(&lanes),
                // The connection is gone; the next statement says why.
                Ok(None) => self.link = None,
                Err(_) => {}
            },
            () = self.shared.control_news.notified() => {}
        }
        Ok(())
    }

    /// Which lanes have something new, or which claims tasks were taken from; several messages that came together are one wake-up.
    fn hear(&mut self, first: &str) {
        let mut books = self.books.borrow_mut();
        let (me, cancels) = (books.me(), &mut self.cancels);
        let mut add = |text: &str| {
            let lanes = text.split(',').filter(|word| !cancels.hear(word, me));
            books.notified.extend(lanes.filter_map(|n| n.trim().parse::<i32>().ok()));
        };
        add(first);
        if let Some(notified) = &mut self.notified {
            while let Ok(more) = notified.try_recv() {
                add(&more);
            }
        }
        let is_for_claimer = !books.notified.is_empty();
        drop(books);
        if is_for_claimer {
            self.shared.claim_news.notify_one();
        }
    }

    /// The heartbeat. If it finds no row we were declared dead: others have our tasks, so nothing of them starts here any more.
    async fn beat(&mut self) -> Result<()> {
        if self.books.borrow().is_lost() {
            return self.register_anew().await;
        }
        let Some(link) = &self.link else { return Ok(()) };
        let (me, epoch, known, last_no) = {
            let books = self.books.borrow();
            (books.me(), books.epoch(), books.reckon(), books.last_no)
        };
        let running = self.running(epoch);
        let stopping = self.shared.phase() >= Phase::Stopping;
        let refused = i64::try_from(Counters::get(&self.shared.counters.refused)).unwrap_or(i64::MAX);
        let sent = Moment::now();
        let row = link.query_opt("beat_consumer", &[&me, &running, &stopping, &refused, &last_no]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        let Some(row) = row else { return Ok(()) };
        let (alive, held): (bool, Vec<i64>) = (row.get(0), row.get(1));
        if !alive {
            self.drop_unstarted(running.len());
            return self.register_anew().await;
        }
        self.shared.beaten(sent);
        // What could not start while contact was lost may start now.
        self.shared.spread();
        self.shared.work.notify_all();
        Counters::add(&self.shared.counters.beats, 1);
        let orphans = known.orphans(&held);
        if orphans.is_empty() {
            return Ok(());
        }
        match self.take_back(me, epoch, &orphans).await {
            Err(e) if !e.is_lost() => {
                let message = format!("{} claims whose answers were lost can't be read: {e}", orphans.len());
                self.lost_claims_trouble.note(self.shared, &e, message);
                Ok(())
            }
            taken => taken,
        }
    }

    /// Claims that the database says we hold, and that we don't know: nobody rescues what a living consumer holds. The completer gives
    /// their tasks back, as it does with all that was not started.
    async fn take_back(&mut self, me: i64, epoch: u32, nos: &[i64]) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        let rows = link.query("read_claims", &[&me, &nos]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        self.lost_claims_trouble.end(self.shared, "claims whose answers were lost can be read again");
        if rows.is_empty() {
            return Ok(());
        }
        let message = format!("gives back {} claims whose answers were lost", rows.len());
        self.shared.log(Level::Warning, "control", message);
        let mut unstarted = Vec::new();
        for row in rows {
            let (no, ids): (i64, IdSet) = (row.get(0), row.get(1));
            // On the books from here on, so that the next heartbeat does not find it again.
            *self.books.borrow_mut().held.entry((epoch, no)).or_default() += ids.len();
            unstarted.extend(ids.iter().map(|id| Ended::given_back(Holder { epoch, no, id })));
        }
        self.shared.outcomes.append(&mut unstarted);
        Ok(())
    }

    /// Our registration is gone. In this order: nothing that a claim under way brings in its name is taken in, no start is allowed any
    /// more, then what waits for one is taken away; only then may a new registration allow starts again, of what is claimed in its name.
    fn drop_unstarted(&mut self, running: u64) {
        let epoch = self.books.borrow().epoch();
        self.books.borrow_mut().lost = Some(epoch);
        self.shared.lose(epoch);
        let dropped = self.shared.sched.lock().take_unstarted();
        let message = format!(
            "was declared dead (silent for {:?}), or its registration was deleted: {} tasks that had not started are left to others, and \
             what becomes of {running} that run will be refused",
            self.shared.settings.dead_after,
            dropped.len()
        );
        self.shared.log(Level::Warning, "control", message);
        let mut books = self.books.borrow_mut();
        for task in &dropped {
            books.settle(task.chunk.epoch, task.chunk.no, 1);
        }
    }

    async fn register_anew(&mut self) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        if self.shared.phase() < Phase::Stopping {
            let me = register(self.shared, link).await?;
            self.books.borrow_mut().epochs.push(me);
            self.shared.claim_news.notify_one();
        }
        Ok(())
    }

    /// Ids whose handlers run, of one registration.
    fn running(&self, epoch: u32) -> IdSet {
        let holders = self.shared.sched.lock().running_holders();
        let mut ids: Vec<i64> = holders.iter().filter(|h| h.epoch == epoch).map(|h| h.id).collect();
        IdSet::from_ids(&mut ids)
    }

    /// Signs off: the row goes, or, where handlers were abandoned, their claims are left to a rescuer at once.
    async fn sign_off(&mut self) {
        let (me, epoch, last_no) = {
            let books = self.books.borrow();
            (books.me(), books.epoch(), books.last_no)
        };
        let running = self.running(epoch);
        if self.link.is_none() {
            self.link = self.target.connect(false).await.ok();
        }
        let Some(link) = &self.link else {
            self.shared.log(Level::Warning, "control", NOT_SIGNED_OFF);
            return;
        };
        if let Err(e) = link.execute("unregister_consumer", &[&me, &running, &last_no]).await {
            self.shared.log(Level::Warning, "control", format!("could not sign off: {e}"));
        }
        self.upkeep.resign(link).await;
    }
}

/// Durations as the seconds that statements take.
pub fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}
