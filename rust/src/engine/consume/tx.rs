//! Tasks that their handlers complete in transactions of their own (`complete_tx`): which claim holds each alone, and how far it has come.
//! A flush without such tasks looks at one number here, and nothing else does.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::consume::task::{Holder, Task};
use crate::engine::error::Result;
use crate::engine::wire::IdSet;

/// How far a task has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Its own claim is being made, or was and the answer is lost.
    Parting,
    /// It is held by a claim of its own, and no transaction was told of that.
    Held,
    /// A statement is on its way that completes it in its handler's transaction.
    Sent,
    /// That statement found the claim: it is for the transaction's end to say what becomes of the task.
    Written,
    /// The transaction was seen to have committed.
    Done,
}

/// One of these tasks.
#[derive(Debug, Clone)]
pub struct Part {
    /// The task.
    pub task: Task,
    /// Who holds its claim.
    pub consumer: i64,
    /// The number of its own claim.
    pub no: i64,
    /// The number that this claim gets where its transaction is found rolled back; 0: none was asked for.
    pub fresh: i64,
    /// See there.
    pub state: State,
    /// A transaction that was to complete it was rolled back, and none was tried since.
    pub was_back: bool,
    /// Which server and database this is, as `find_home.sql` answers.
    pub home: [i64; 2],
}

/// What a handler is told that wants to complete its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It may: a claim holds this task alone.
    Held,
    /// An earlier transaction is to complete it, and has not ended.
    Open,
    /// An earlier transaction has completed it.
    Done,
    /// The run has lost its claim.
    Lost,
    /// The handler has ended, or its attempt has.
    Ended,
}

/// A question on its way to the completer.
#[derive(Debug)]
pub struct Ask {
    /// The task.
    pub task: Task,
    /// The statement about it was sent before, and no answer came.
    pub in_doubt: bool,
    reply: SyncSender<Result<Answer>>,
}

impl Ask {
    /// Answers it. Who asked may be gone.
    pub fn answer(self, answer: Result<Answer>) {
        drop(self.reply.try_send(answer));
    }
}

/// A task whose handler returned although its transaction was rolled back: a failed attempt.
#[derive(Debug)]
pub struct Undone {
    /// The task.
    pub task: Task,
    /// Its run time in microseconds.
    pub took_us: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Tx {
    parts: Mutex<HashMap<Holder, Part>>,
    asks: Mutex<Vec<Ask>>,
    undone: Mutex<Vec<Undone>>,
    /// Parts and asks.
    busy: AtomicUsize,
    closed: AtomicBool,
    /// There is something to answer.
    pub news: Notify,
}

impl Tx {
    /// Whether there is nothing of all this.
    pub fn is_idle(&self) -> bool {
        self.busy.load(Ordering::Acquire) == 0
    }

    /// Has the completer see to it that this task is held by a claim of its own, or find out what became of its transaction. `None`: the
    /// engine has ended.
    pub fn ask(&self, task: Task) -> Option<Receiver<Result<Answer>>> {
        let (reply, answer) = sync_channel(1);
        let mut asks = self.asks.lock();
        if self.closed.load(Ordering::Acquire) {
            return None;
        }
        asks.push(Ask { task, in_doubt: false, reply });
        self.busy.fetch_add(1, Ordering::AcqRel);
        drop(asks);
        self.news.notify_one();
        Some(answer)
    }

    /// Whether somebody waits for an answer.
    pub fn has_asks(&self) -> bool {
        !self.asks.lock().is_empty()
    }

    /// What is to be answered.
    pub fn take_asks(&self) -> Vec<Ask> {
        let asks = std::mem::take(&mut *self.asks.lock());
        self.busy.fetch_sub(asks.len(), Ordering::AcqRel);
        asks
    }

    /// Questions that could not be answered yet.
    pub fn put_back(&self, mut asks: Vec<Ask>) {
        self.busy.fetch_add(asks.len(), Ordering::AcqRel);
        self.asks.lock().append(&mut asks);
    }

    /// Nobody answers any more.
    pub fn close(&self) {
        let mut asks = self.asks.lock();
        self.closed.store(true, Ordering::Release);
        asks.clear();
    }

    /// What is known of a task, if it is one of these.
    pub fn get(&self, holder: &Holder) -> Option<Part> {
        self.parts.lock().get(holder).cloned()
    }

    /// Takes in or changes one.
    pub fn set(&self, holder: Holder, part: Part) {
        if self.parts.lock().insert(holder, part).is_none() {
            self.busy.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Changes what is known of one, and answers what is known then.
    pub fn change(&self, holder: &Holder, change: impl FnOnce(&mut Part)) -> Option<Part> {
        let mut parts = self.parts.lock();
        let part = parts.get_mut(holder)?;
        change(part);
        Some(part.clone())
    }

    /// It is none of these any more, if no transaction is to complete it and `is_wanted`. From here on none can be.
    pub fn take_held(&self, holder: &Holder, is_wanted: impl FnOnce(&Part) -> bool) -> Option<Part> {
        let mut parts = self.parts.lock();
        if !parts.get(holder).is_some_and(|p| p.state == State::Held && is_wanted(p)) {
            return None;
        }
        let part = parts.remove(holder);
        self.busy.fetch_sub(1, Ordering::AcqRel);
        part
    }

    /// It is none of these any more.
    pub fn remove(&self, holder: &Holder) {
        if self.parts.lock().remove(holder).is_some() {
            self.busy.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A statement is about to be sent that completes it in a transaction: the claim that it looks for. `None`: the run has ended.
    pub fn send(&self, holder: &Holder) -> Option<Part> {
        let mut parts = self.parts.lock();
        let part = parts.get_mut(holder).filter(|p| p.state == State::Held)?;
        part.state = State::Sent;
        Some(part.clone())
    }

    /// That statement found the claim.
    pub fn wrote(&self, holder: &Holder) {
        if let Some(part) = self.parts.lock().get_mut(holder).filter(|p| p.state == State::Sent) {
            part.state = State::Written;
        }
    }

    /// Whether such a statement was sent, so that the transaction decides.
    pub fn is_sent(&self, holder: &Holder) -> bool {
        !self.is_idle() && self.parts.lock().get(holder).is_some_and(|p| p.state >= State::Sent)
    }

    /// Of claims ($1 in `read_own_claims.sql`) those, too, that hold tasks of theirs alone, or whose tasks these are.
    pub fn add_claims(&self, epoch: u32, nos: &mut std::collections::BTreeSet<i64>) {
        for (holder, part) in self.parts.lock().iter().filter(|(h, _)| h.epoch == epoch) {
            if nos.contains(&holder.no) || nos.contains(&part.no) {
                nos.extend([holder.no, part.no]);
            }
        }
    }

    /// In what claims were found to hold, adds to those that tasks were claimed by what claims of their own hold; and tasks whose
    /// transactions decide, or whose own claims were not asked about: a claim may have been made for them meanwhile.
    pub fn add_held(&self, epoch: u32, held: &mut HashMap<i64, IdSet>) {
        for (holder, part) in self.parts.lock().iter().filter(|(h, _)| h.epoch == epoch) {
            let own = held.get(&part.no);
            let is_held = part.state >= State::Sent || own.is_none_or(|ids| ids.contains(holder.id));
            if let (true, Some(ids)) = (is_held, held.get_mut(&holder.no)) {
                *ids = IdSet::from_ids(&mut ids.iter().chain([holder.id]).collect::<Vec<_>>());
            }
        }
    }

    /// A handler returned although its transaction was rolled back.
    pub fn add_undone(&self, undone: Undone) {
        self.undone.lock().push(undone);
    }

    /// Those, for Python to say how they are retried.
    pub fn take_undone(&self) -> Vec<Undone> {
        std::mem::take(&mut *self.undone.lock())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use super::*;
    use crate::engine::consume::task::Chunk;

    fn part(no: i64, id: i64, own: i64, state: State) -> (Holder, Part) {
        let mut chunk = Chunk::new(0, no, 0, Arc::from("default"), 0, 0, 3);
        chunk.push(id, 0, b'j', b"{}");
        let task = Task { chunk: Arc::new(chunk), at: 0 };
        (task.holder(), Part { task, consumer: 7, no: own, fresh: 0, state, was_back: false, home: [0, 0] })
    }

    fn held(claims: &[(i64, &[i64])]) -> HashMap<i64, IdSet> {
        claims.iter().map(|(no, ids)| (*no, IdSet::from_ids(&mut ids.to_vec()))).collect()
    }

    #[test]
    fn only_what_is_held_may_be_sent_and_once() {
        let tx = Tx::default();
        let (holder, waiting) = part(1, 5, 9, State::Parting);
        tx.set(holder, waiting);
        assert!(tx.send(&holder).is_none(), "its claim may not be there");
        let (_, ready) = part(1, 5, 9, State::Held);
        tx.set(holder, ready);
        assert!(!tx.is_sent(&holder));
        assert_eq!(tx.send(&holder).map(|p| p.no), Some(9));
        assert!(tx.is_sent(&holder));
        assert!(tx.send(&holder).is_none());
        assert!(!tx.is_idle());
        assert!(tx.take_held(&holder, |_| true).is_none(), "its transaction decides");
        tx.remove(&holder);
        tx.remove(&holder);
        assert!(tx.is_idle() && tx.send(&holder).is_none());
        let (_, ready) = part(1, 5, 9, State::Held);
        tx.set(holder, ready);
        assert!(tx.take_held(&holder, |_| false).is_none());
        assert_eq!(tx.take_held(&holder, |_| true).map(|p| p.no), Some(9));
        assert!(tx.is_idle() && tx.send(&holder).is_none(), "the handler's outcome counts");
    }

    #[test]
    fn what_a_thread_says_of_its_statement_is_not_lost_to_what_the_completer_notes() {
        let tx = Tx::default();
        let (holder, ready) = part(1, 5, 9, State::Held);
        tx.set(holder, ready);
        tx.send(&holder);
        let noted = tx.change(&holder, |part| {
            part.fresh = 10;
        });
        tx.wrote(&holder);
        assert_eq!(noted.map(|p| (p.state, p.fresh)), Some((State::Sent, 10)));
        assert_eq!(tx.get(&holder).map(|p| (p.state, p.fresh)), Some((State::Written, 10)));
    }

    #[test]
    fn a_task_that_moved_to_its_own_claim_is_not_taken_for_cancelled() {
        let tx = Tx::default();
        let (holder, at) = part(1, 5, 9, State::Held);
        tx.set(holder, at);
        let mut nos = BTreeSet::from([1]);
        tx.add_claims(0, &mut nos);
        assert_eq!(nos, BTreeSet::from([1, 9]));
        let mut found = held(&[(1, &[4, 6]), (9, &[5])]);
        tx.add_held(0, &mut found);
        assert_eq!(found[&1].iter().collect::<Vec<_>>(), [4, 5, 6]);
        // It moved while the question was under way: nobody asked about its own claim.
        let mut found = held(&[(1, &[4, 6])]);
        tx.add_held(0, &mut found);
        assert!(found[&1].contains(5));
        // Cancelled.
        let mut found = held(&[(1, &[4, 6]), (9, &[])]);
        tx.add_held(0, &mut found);
        assert!(!found[&1].contains(5));
        // Its transaction may have committed: no claim holds it then, either.
        tx.send(&holder);
        tx.add_held(0, &mut found);
        assert!(found[&1].contains(5));
        let mut found = held(&[(1, &[4, 6])]);
        tx.add_held(1, &mut found);
        assert!(!found[&1].contains(5), "another registration's");
    }

    #[test]
    fn who_asks_an_engine_that_has_ended_is_not_left_waiting() {
        let tx = Tx::default();
        let (_, at) = part(1, 5, 9, State::Held);
        let waiting = tx.ask(at.task.clone()).expect("it is open");
        tx.close();
        assert!(waiting.recv().is_err());
        assert!(tx.ask(at.task).is_none());
    }
}
