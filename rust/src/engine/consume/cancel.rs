//! How a worker learns that tasks which it claimed were cancelled: told by a notification, or by looking.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::engine::connect::Link;
use crate::engine::consume::Shared;
use crate::engine::consume::books::Books;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::moment::Moment;
use crate::engine::consume::trouble::{Trouble, some_of};
use crate::engine::error::Result;
use crate::engine::logs::Level;
use crate::engine::wire::IdSet;

/// How often it is seen whether there is anything to ask; costs no statement.
const SCAN: Duration = Duration::from_millis(500);
/// So often is asked, at most, and not before a handler has been at work for so long: nothing for those whose handlers are shorter.
const ASK: Duration = Duration::from_secs(1);
/// Until a claim that is under way is seen to again.
const SOON: Duration = Duration::from_millis(10);

/// See the module. A notification is a hint, as a look of its own accord is: what the claims hold says what was cancelled.
#[derive(Debug)]
pub struct Cancels {
    /// Claims of the present registration that a notification named.
    named: BTreeSet<i64>,
    /// When there is something to do next.
    pub due_at: Instant,
    scan_at: Instant,
    ask_at: Instant,
    trouble: Trouble,
}

impl Default for Cancels {
    /// Nothing is known.
    fn default() -> Self {
        let now = Instant::now();
        let trouble = Trouble::new("control");
        Self { named: BTreeSet::new(), due_at: now, scan_at: now, ask_at: now, trouble }
    }
}

impl Cancels {
    /// Takes in a word of a notification, `consumer:claim`; others mean something else.
    pub fn hear(&mut self, word: &str, me: i64) -> bool {
        let Some((consumer, no)) = word.split_once(':') else { return false };
        if let (Ok(consumer), Ok(no)) = (consumer.parse::<i64>(), no.parse::<i64>())
            && consumer == me
        {
            self.named.insert(no);
            self.due_at = Instant::now();
        }
        true
    }

    /// Asks what the claims still hold that were named or have long runs, if there are any; tells the scheduler what is gone.
    pub async fn look(&mut self, shared: &Shared, books: &RefCell<Books>, link: &Link) -> Result<()> {
        let now = Instant::now();
        if now < self.due_at {
            return Ok(());
        }
        let (me, epoch) = (books.borrow().me(), books.borrow().epoch());
        let mut nos = self.take_named(&books.borrow());
        if now >= self.scan_at {
            self.scan_at = now + SCAN;
            if now >= self.ask_at && !books.borrow().is_lost() {
                let long = shared.sched.lock().long_claims(epoch, Moment::now(), SCAN, ASK);
                if !long.is_empty() {
                    self.ask_at = now + ASK;
                    nos.extend(long);
                }
            }
        }
        self.due_at = if self.named.is_empty() { self.scan_at } else { self.scan_at.min(now + SOON) };
        if nos.is_empty() {
            return Ok(());
        }
        shared.tx.add_claims(epoch, &mut nos);
        let nos: Vec<i64> = nos.into_iter().collect();
        let asked = link.query("read_own_claims", &[&me, &nos]).await;
        Counters::add(&shared.counters.statements, 1);
        let rows = match asked {
            Err(e) if !e.is_lost() => {
                let message = format!("can't tell which running tasks were cancelled, and keeps asking: {e}");
                self.trouble.note(shared, &e, message);
                return Ok(());
            }
            asked => asked?,
        };
        self.trouble.end(shared, "can tell again which running tasks were cancelled");
        let mut held: HashMap<i64, IdSet> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        // After the answer: what moved to a claim of its own meanwhile is known by now.
        shared.tx.add_held(epoch, &mut held);
        Self::tell(shared, books, epoch, &held);
        Ok(())
    }

    /// Claims that were named and whose tasks are here. Those of a claim that is under way are here soon; of all others none is here.
    fn take_named(&mut self, books: &Books) -> BTreeSet<i64> {
        let epoch = books.epoch();
        let (here, away): (BTreeSet<i64>, _) =
            std::mem::take(&mut self.named).into_iter().partition(|no| books.held.contains_key(&(epoch, *no)));
        let is_under_way = |no: &i64| books.claiming_after.is_some_and(|after| after < *no && *no <= books.last_no);
        self.named = away;
        self.named.retain(is_under_way);
        here
    }

    fn tell(shared: &Shared, books: &RefCell<Books>, epoch: u32, held: &HashMap<i64, IdSet>) {
        let lost = shared.sched.lock().lose(epoch, held);
        let (running, unstarted) = (lost.running.len(), lost.unstarted.len());
        if running + unstarted == 0 {
            return;
        }
        for holder in &lost.unstarted {
            books.borrow_mut().settle(holder.epoch, holder.no, 1);
        }
        Counters::add(&shared.counters.cancelled, running + unstarted);
        let ids: Vec<i64> = lost.running.into_iter().chain(lost.unstarted.iter().map(|h| h.id)).collect();
        let message = format!(
            "{} tasks were cancelled: the handlers of {running} are told, {unstarted} had not started (ids {})",
            ids.len(),
            some_of(&ids)
        );
        shared.log(Level::Info, "control", message);
        shared.spread();
    }
}
