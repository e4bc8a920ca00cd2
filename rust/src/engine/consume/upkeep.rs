//! Upkeep: the tick that takes or keeps the leader's lease, and what the leader does: declare deaths, rescue, promote, and (in `retain`)
//! forget. Every statement asks for holder and term, so two leaders at once do no harm.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::engine::connect::Link;
use crate::engine::consume::Shared;
use crate::engine::consume::books::Books;
use crate::engine::consume::control::seconds;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::retain::Retention;
use crate::engine::error::Result;
use crate::engine::logs::Level;
use crate::engine::sql;

/// A leader looks this often; others half as often.
const TICK: Duration = Duration::from_millis(500);
/// Claims in one rescue statement.
const RESCUE: i64 = 50;
/// Tasks in one promotion.
const PROMOTE: i64 = 5_000;
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
    retention: Retention,
    /// Tasks in the next promotion.
    promote: i64,
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
        let retention = Retention::new(shared.settings.completed_retention, shared.settings.failed_retention);
        Self { shared, books, term: None, contact: None, retention, promote: PROMOTE }
    }

    /// The database could not be reached: silence does not count from here on.
    pub fn lose_contact(&mut self) {
        self.contact = None;
    }

    /// One tick; answers when the next is due.
    pub async fn tick(&mut self, link: &Link) -> Result<Duration> {
        let settings = &self.shared.settings;
        let me = self.books.borrow().me();
        let sent = Instant::now();
        let (lease, renew, dead_after) =
            (seconds(settings.lease), seconds(settings.lease) * 2.0 / 3.0, seconds(settings.dead_after));
        let row = link.query_opt("tick", &[&me, &lease, &renew, &dead_after]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        let Some(row) = row else { return Ok(TICK) };
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
        let Some(term) = term else { return Ok(TICK * 2) };
        let (silent, orphaned, dead): (bool, bool, bool) = (row.get("silent"), row.get("orphaned"), row.get("dead"));
        let mut next = TICK;
        if silent && self.is_in_contact() {
            self.declare_dead(link, me, term).await?;
            next = Duration::ZERO;
        } else if orphaned {
            next = if self.rescue(link, me, term).await? { Duration::ZERO } else { TICK };
        } else if dead {
            link.execute("forget_consumers", &[&me, &term]).await?;
            Counters::add(&self.shared.counters.statements, 1);
        }
        let open_leaf: Option<i16> = row.get("open_leaf");
        let due_in: Option<f64> = row.get("due_in");
        if let (Some(due_in), Some(leaf)) = (due_in, open_leaf) {
            if due_in <= 0.0 {
                if self.promote(link, me, term, leaf).await? {
                    next = Duration::ZERO;
                }
            } else if due_in < seconds(next) {
                // To the moment: a task starts when its time comes, not at the next look.
                next = Duration::from_secs_f64(due_in) + Duration::from_millis(1);
            }
        }
        if let Err(e) = self.retention.work(self.shared, link, me, term).await {
            if e.is_lost() {
                return Err(e);
            }
            // A right that is missing, say: rescue and promotion go on all the same.
            self.shared.log(
                Level::Warning,
                "leader",
                format!("old tasks can't be forgotten, tried again in the next round: {e}"),
            );
            self.retention.postpone();
        }
        Ok(next)
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
        match (self.term, term) {
            (None, Some(term)) => self.shared.log(Level::Info, "leader", format!("leads from here on (term {term})")),
            (Some(old), None) => self.shared.log(Level::Info, "leader", format!("leads no more (term {old})")),
            _ => {}
        }
        self.term = term;
    }

    async fn declare_dead(&self, link: &Link, me: i64, term: i64) -> Result<()> {
        let dead_after = seconds(self.shared.settings.dead_after);
        let rows = link.query("declare_dead", &[&me, &term, &dead_after]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        for row in rows {
            let (host, pid, silent): (&str, i32, f64) = (row.get(1), row.get(2), row.get(3));
            self.shared.log(
                Level::Warning,
                "leader",
                format!("process {pid} on {host} is dead: silent for {silent:.1} s"),
            );
        }
        Ok(())
    }

    /// Rescues one batch of claims; answers whether there was any.
    async fn rescue(&self, link: &Link, me: i64, term: i64) -> Result<bool> {
        let rows = link.query("rescue_claims", &[&me, &term, &RESCUE]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        for row in &rows {
            let (host, pid): (Option<&str>, Option<i32>) = (row.get(1), row.get(2));
            let who = match (pid, host) {
                (Some(pid), Some(host)) => format!("process {pid} on {host}"),
                _ => "an unknown consumer".to_owned(),
            };
            let (claims, tasks, charged, failed): (i64, i64, i64, i64) =
                (row.get(3), row.get(4), row.get(5), row.get(6));
            let message = format!(
                "rescued {tasks} tasks in {claims} claims of {who}: {charged} were running and are charged, {failed} of them have failed for good"
            );
            self.shared.log(Level::Warning, "leader", message);
        }
        Ok(!rows.is_empty())
    }

    /// Promotes one batch; answers whether there may be more. A statement that fails for one of its members is tried with fewer, and
    /// alone at last the culprit is put off, so that it keeps nobody from starting.
    async fn promote(&mut self, link: &Link, me: i64, term: i64, leaf: i16) -> Result<bool> {
        Counters::add(&self.shared.counters.statements, 1);
        let row = match link.query_opt("promote_tasks", &[&me, &term, &self.promote, &leaf]).await {
            Ok(row) => row,
            Err(e) if e.is_data_fault() && self.promote > 1 => {
                self.promote /= 2;
                return Ok(true);
            }
            Err(e) if e.is_data_fault() => {
                let row = link.query_opt("postpone_task", &[&me, &term]).await?;
                let id: Option<i64> = row.map(|r| r.get(0));
                self.shared.log(
                    Level::Error,
                    "leader",
                    format!("task {id:?} can't be made ready, and is put off for a minute: {e}"),
                );
                return Ok(true);
            }
            Err(e) if e.is_lost() => return Err(e),
            Err(e) => {
                self.shared.log(
                    Level::Warning,
                    "leader",
                    format!("due tasks can't be made ready, and it is tried again: {e}"),
                );
                return Ok(false);
            }
        };
        let Some(row) = row else { return Ok(false) };
        let (promoted, lanes): (i64, Vec<i32>) = (row.get(0), row.get(1));
        let more = promoted == self.promote;
        self.promote = (self.promote * 2).min(PROMOTE);
        if promoted > 0 {
            self.notify(link, &lanes).await?;
        }
        Ok(more)
    }

    /// Wakes all consumers; ours at once.
    async fn notify(&self, link: &Link, lanes: &[i32]) -> Result<()> {
        self.books.borrow_mut().notified.extend_from_slice(lanes);
        self.shared.claim_news.notify_one();
        let text: Vec<String> = lanes.iter().map(ToString::to_string).collect();
        link.query("notify_ready", &[&sql::channel(&self.shared.settings.schema), &text.join(",")]).await?;
        Counters::add(&self.shared.counters.statements, 1);
        Ok(())
    }

    /// Gives up the lease, so that another leads at once.
    pub async fn resign(&mut self, link: &Link) {
        if let Some(term) = self.term.take() {
            let me = self.books.borrow().me();
            if let Err(e) = link.execute("resign_leader", &[&me, &term]).await {
                self.shared.log(Level::Debug, "leader", format!("could not give up the lease: {e}"));
            }
        }
    }
}
