//! Upkeep: the tick that takes or keeps the leader's lease, and what the leader does: declare deaths, rescue, promote, and (in `retain`)
//! forget. Every statement asks for holder and term, so two leaders at once do no harm.

mod rescue;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::engine::connect::Link;
use crate::engine::consume::Shared;
use crate::engine::consume::books::Books;
use crate::engine::consume::control::seconds;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::retain::Retention;
use crate::engine::consume::trouble::{Named, Trouble};
use crate::engine::error::{Error, Result};
use crate::engine::logs::Level;
use crate::engine::sql;

use rescue::Rescuer;

/// A leader looks this often; others half as often.
const TICK: Duration = Duration::from_millis(500);
/// Tasks in one promotion.
const PROMOTE: i64 = 5_000;
/// Chunks, or tasks that wait for a time, of which one statement looks for what has expired.
const EXPIRE: i64 = 100;
/// A tick that took longer, or came later, breaks contact: what looked silent may have been us.
const UNBROKEN: Duration = Duration::from_secs(2);
/// The database's clock may run this much off ours between two ticks before contact is broken.
const CLOCK_JUMP_S: f64 = 1.0;

/// See the module.
pub struct Upkeep<'a> {
    shared: &'a Shared,
    books: Rc<RefCell<Books>>,
    term: Option<i64>,
    /// Since when the database answered without a gap; `None`: not now.
    contact: Option<Contact>,
    rescuer: Rescuer,
    rescue_trouble: Trouble,
    forgetting_trouble: Trouble,
    retention: Retention,
    retention_trouble: Trouble,
    /// Tasks in the next promotion.
    promote: i64,
    promotion_trouble: Trouble,
    /// Chunks, or tasks, in the next statement that looks for what has expired.
    expire: i64,
    expiry_trouble: Trouble,
    /// Tasks that could not be made ready and that were named.
    postponed: Named,
    /// Lanes with tasks made ready of which the others were not told yet.
    untold: BTreeSet<i32>,
    notify_trouble: Trouble,
    /// What the last look has shown, where a heartbeat came between.
    seen: Option<Seen>,
}

/// What the leader sees in one look, and has not done yet.
#[derive(Debug)]
struct Seen {
    at: Instant,
    /// Holder and term.
    leader: (i64, i64),
    silent: Vec<i64>,
    orphaned: bool,
    dead: bool,
    open_leaf: Option<i16>,
    due_in: Option<f64>,
    expired: bool,
    /// The last one first.
    duties: Vec<Duty>,
    /// Until the next look.
    next: Duration,
}

#[derive(Debug, Clone, Copy)]
enum Duty {
    Notify,
    Rescue,
    Forget,
    Expire,
    Promote,
    Retain,
}

#[derive(Debug, Clone, Copy)]
struct Contact {
    since: Instant,
    last: Instant,
    server_time: f64,
}

impl<'a> Upkeep<'a> {
    /// Not the leader, not in contact.
    pub fn new(shared: &'a Shared, books: Rc<RefCell<Books>>) -> Self {
        let retention = Retention::new(&shared.settings.retention);
        Self {
            shared,
            books,
            term: None,
            contact: None,
            rescuer: Rescuer::default(),
            rescue_trouble: Trouble::new("leader"),
            forgetting_trouble: Trouble::new("leader"),
            retention,
            retention_trouble: Trouble::new("leader"),
            promote: PROMOTE,
            promotion_trouble: Trouble::new("leader"),
            expire: EXPIRE,
            expiry_trouble: Trouble::new("leader"),
            postponed: Named::default(),
            untold: BTreeSet::new(),
            notify_trouble: Trouble::new("leader"),
            seen: None,
        }
    }

    /// The database could not be reached: silence does not count from here on.
    pub fn lose_contact(&mut self) {
        self.contact = None;
        self.seen = None;
    }

    /// One tick; answers when the next is due. Each of its statements may take its time: once the heartbeat is due (`beat_at`) the rest is
    /// left to the next tick, at once after it. However late it is, each tick sends one statement: a slow database is no end of upkeep.
    pub async fn tick(&mut self, link: &Link, beat_at: Instant) -> Result<Duration> {
        let (mut seen, mut is_first) = match self.seen.take() {
            Some(seen) => (seen, true),
            None => match self.look(link).await? {
                Some(seen) => (seen, false),
                None => return Ok(TICK * 2),
            },
        };
        while let Some(duty) = seen.duties.pop() {
            if !is_first && Instant::now() >= beat_at {
                seen.duties.push(duty);
                self.seen = Some(seen);
                return Ok(Duration::ZERO);
            }
            is_first = false;
            self.do_duty(link, beat_at, duty, &mut seen).await?;
        }
        Ok(seen.next)
    }

    /// Takes or keeps the lease, and looks what there is to do for its holder.
    async fn look(&mut self, link: &Link) -> Result<Option<Seen>> {
        let settings = &self.shared.settings;
        let me = self.books.borrow().me();
        let sent = Instant::now();
        let (lease, renew, dead_after) =
            (seconds(settings.lease), seconds(settings.lease) * 2.0 / 3.0, seconds(settings.dead_after));
        let row = link.query_opt("tick", &[&me, &lease, &renew, &dead_after, &settings.upkeep]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        let Some(row) = row else { return Ok(None) };
        let (server_time, term): (f64, Option<i64>) = (row.get("now"), row.get("term"));
        self.note_contact(sent, server_time);
        self.note_term(term);
        let last_lane: i32 = row.get::<_, Option<i32>>("last_lane").unwrap_or(0);
        let lanes = (last_lane, row.get::<_, i64>("lanes"));
        let (careful, alone): (Vec<i32>, Vec<i32>) = (row.get("careful_lanes"), row.get("alone_lanes"));
        {
            let mut books = self.books.borrow_mut();
            if lanes != books.lanes {
                books.lanes = lanes;
                books.lanes_changed = true;
                self.shared.claim_news.notify_one();
            }
            if !careful.is_empty() || !alone.is_empty() {
                books.careful_lanes = careful;
                books.alone_lanes = alone;
                self.shared.claim_news.notify_one();
            }
        }
        let Some(term) = term else { return Ok(None) };
        Ok(Some(Seen {
            at: Instant::now(),
            leader: (me, term),
            silent: if self.is_in_contact() { row.get("silent") } else { Vec::new() },
            orphaned: row.get("orphaned"),
            dead: row.get("dead"),
            open_leaf: row.get("open_leaf"),
            due_in: row.get("due_in"),
            expired: row.get("expired"),
            duties: vec![Duty::Retain, Duty::Promote, Duty::Expire, Duty::Rescue, Duty::Notify],
            next: TICK,
        }))
    }

    async fn do_duty(&mut self, link: &Link, beat_at: Instant, duty: Duty, seen: &mut Seen) -> Result<()> {
        let leader = seen.leader;
        match duty {
            Duty::Notify => {
                let told = self.notify(link).await;
                self.or_later(told, |u| &mut u.notify_trouble, "other workers can't be told what is ready")?;
            }
            Duty::Rescue => {
                let rescued = self.rescuer.work(self.shared, link, leader, &seen.silent, seen.orphaned, beat_at).await;
                if self.or_later(rescued, |u| &mut u.rescue_trouble, "tasks of dead workers can't be rescued")? {
                    seen.next = Duration::ZERO;
                } else if seen.dead {
                    seen.duties.push(Duty::Forget);
                }
            }
            Duty::Forget => {
                let forgotten = Rescuer::forget(self.shared, link, leader).await;
                self.or_later(forgotten, |u| &mut u.forgetting_trouble, "dead workers can't be forgotten")?;
            }
            Duty::Expire => {
                if seen.expired {
                    let expired = self.expire(link, leader).await;
                    if self.or_later(
                        expired,
                        |u| &mut u.expiry_trouble,
                        "tasks that were not started in time can't end",
                    )? {
                        seen.next = Duration::ZERO;
                    }
                }
            }
            Duty::Promote => {
                let (Some(due_in), Some(leaf)) = (seen.due_in, seen.open_leaf) else { return Ok(()) };
                let due_in = due_in - seconds(seen.at.elapsed());
                if due_in <= 0.0 {
                    let promoted = self.promote(link, leader, leaf).await;
                    if self.or_later(promoted, |u| &mut u.promotion_trouble, "due tasks can't be made ready")? {
                        seen.next = Duration::ZERO;
                    }
                    seen.duties.push(Duty::Notify);
                } else if due_in < seconds(seen.next) {
                    // To the moment: a task starts when its time comes, not at the next look.
                    seen.next = Duration::from_secs_f64(due_in) + Duration::from_millis(1);
                }
            }
            // No longer than until a delayed task is due.
            Duty::Retain => {
                match self.retention.work(self.shared, link, leader, beat_at.min(Instant::now() + seen.next)).await {
                    // A whole round: some of its steps may work where others will fail again.
                    Ok(true) => self.retention_trouble.end(self.shared, "old tasks can be forgotten again"),
                    Ok(false) => {}
                    Err(e) if e.is_lost() => return Err(e),
                    Err(e) => {
                        let message = format!("old tasks can't be forgotten, tried again in the next round: {e}");
                        self.retention_trouble.note(self.shared, &e, message);
                    }
                }
            }
        }
        Ok(())
    }

    /// One duty's result. If it failed with the connection whole (a right is missing, say), it is tried again at its time, and the other
    /// duties go on. True: there is more to do at once.
    fn or_later(
        &mut self,
        done: Result<bool>,
        trouble: impl FnOnce(&mut Self) -> &mut Trouble,
        what: &str,
    ) -> Result<bool> {
        let shared = self.shared;
        match done {
            Ok(more) => {
                trouble(self).end(shared, &format!("over: {what}"));
                Ok(more)
            }
            Err(e) if e.is_lost() => Err(e),
            Err(e) => {
                trouble(self).note(shared, &e, format!("{what}, and it is tried again: {e}"));
                Ok(false)
            }
        }
    }

    fn note_contact(&mut self, sent: Instant, server_time: f64) {
        let now = Instant::now();
        let unbroken = self.contact.filter(|c| {
            let ours = now.saturating_duration_since(c.last);
            let drift = (server_time - c.server_time - ours.as_secs_f64()).abs();
            ours < UNBROKEN + TICK * 2 && now.saturating_duration_since(sent) < UNBROKEN && drift < CLOCK_JUMP_S
        });
        self.contact = Some(Contact { since: unbroken.map_or(now, |c| c.since), last: now, server_time });
    }

    /// Whether a worker that was silent for the dead time was so while we could hear it.
    fn is_in_contact(&self) -> bool {
        self.contact.is_some_and(|c| c.since.elapsed() >= self.shared.settings.dead_after)
    }

    fn note_term(&mut self, term: Option<i64>) {
        if self.term == term {
            return;
        }
        match (self.term, term) {
            (Some(old), None) => self.shared.log(Level::Info, "leader", format!("leads no more (term {old})")),
            (_, Some(term)) => self.shared.log(Level::Info, "leader", format!("leads from here on (term {term})")),
            (None, None) => {}
        }
        self.term = term;
        self.rescuer.start_over(self.shared);
    }

    /// Ends waiting tasks whose time to start is over; answers whether there may be more. Where the statement fails for one of them it is
    /// tried with fewer, and of one at last with each tick: what is behind that one ends when it is claimed or due.
    async fn expire(&mut self, link: &Link, (me, term): (i64, i64)) -> Result<bool> {
        Counters::add(&self.shared.counters.statements, 2);
        let expired = async {
            let chunks = link.query_opt("expire_ready", &[&me, &term, &self.expire]).await?;
            let delayed = link.query_opt("expire_delayed", &[&me, &term, &self.expire]).await?;
            let count = |row: Option<tokio_postgres::Row>| row.map_or(0, |row| row.get::<_, i64>(0));
            Ok(count(chunks).max(count(delayed)))
        };
        match expired.await {
            Ok(count) => {
                let more = count >= self.expire;
                self.expire = (self.expire * 2).min(EXPIRE);
                Ok(more)
            }
            Err(e) if Error::is_data_fault(&e) && self.expire > 1 => {
                self.expire /= 2;
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }

    /// Promotes one batch; answers whether there may be more. A statement that fails for one of its members is tried with fewer, and
    /// alone at last the culprit is put off, so that it keeps nobody from starting.
    async fn promote(&mut self, link: &Link, (me, term): (i64, i64), leaf: i16) -> Result<bool> {
        Counters::add(&self.shared.counters.statements, 1);
        let row = match link.query_opt("promote_tasks", &[&me, &term, &self.promote, &leaf]).await {
            Ok(row) => row,
            Err(e) if e.is_data_fault() && self.promote > 1 => {
                self.promote /= 2;
                return Ok(true);
            }
            Err(e) if e.is_data_fault() => {
                let Some(row) = link.query_opt("postpone_task", &[&me, &term]).await? else { return Ok(false) };
                self.name_postponed(row.get(0), &e);
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        let Some(row) = row else { return Ok(false) };
        let (promoted, lanes): (i64, Vec<i32>) = (row.get(0), row.get(1));
        let more = promoted == self.promote;
        self.promote = (self.promote * 2).min(PROMOTE);
        if promoted > 0 {
            // Ours at once, the others in a statement of its own.
            self.books.borrow_mut().notified.extend_from_slice(&lanes);
            self.shared.claim_news.notify_one();
            self.untold.extend(lanes);
        }
        Ok(more)
    }

    fn name_postponed(&mut self, id: i64, error: &Error) {
        let level = self.postponed.level(id);
        let message = format!("task {id} can't be made ready, and is put off for a minute: {error}");
        self.shared.log(level, "leader", message);
    }

    /// Wakes all consumers.
    async fn notify(&mut self, link: &Link) -> Result<bool> {
        if !self.untold.is_empty() {
            let text: Vec<String> = self.untold.iter().map(ToString::to_string).collect();
            Counters::add(&self.shared.counters.statements, 1);
            link.query("notify_ready", &[&sql::channel(&self.shared.settings.schema), &text.join(",")]).await?;
            self.untold.clear();
        }
        Ok(false)
    }

    /// Gives up the lease, so that another leads at once.
    pub async fn resign(&mut self, link: &Link) {
        self.rescuer.start_over(self.shared);
        if let Some(term) = self.term.take() {
            let me = self.books.borrow().me();
            if let Err(e) = link.execute("resign_leader", &[&me, &term]).await {
                self.shared.log(Level::Debug, "leader", format!("could not give up the lease: {e}"));
            }
        }
    }
}
