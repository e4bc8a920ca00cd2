//! The completer's part in `complete_tx`: it gives a task a claim of its own before its handler's transaction comes to it, and finds out
//! what became of that transaction once the handler has ended. It waits for no transaction: one that is open is looked at again later.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::consume::books::Books;
use crate::engine::consume::complete::Completer;
use crate::engine::consume::complete::flush::Flush;
use crate::engine::consume::counters::Counters;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::task::{Holder, Outcome};
use crate::engine::consume::tx::{Answer, Ask, Part, State, Undone};
use crate::engine::error::Result;
use crate::engine::logs::Level;

/// Until an open transaction is looked at again, at first and at most.
const LOOK: Duration = Duration::from_millis(10);
const LOOK_AT_MOST: Duration = Duration::from_millis(500);

/// An outcome that counts only if its handler's transaction did not complete the task.
#[derive(Debug)]
pub(super) struct Undecided {
    pub(super) ended: Ended,
    look: Duration,
    pub(super) due_at: Instant,
}

/// What a handler's transaction has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    Open,
    Back,
    Lost,
}

impl Completer<'_> {
    /// Whether there is anything to do here now.
    pub(super) fn has_tx_work(&self) -> bool {
        if self.shared.tx.is_idle() && self.undecided.is_empty() {
            return false;
        }
        let now = Instant::now();
        now >= self.tx_at && (self.shared.tx.has_asks() || self.undecided.iter().any(|u| u.due_at <= now))
    }

    /// How long nothing here needs doing, if nobody asks.
    pub(super) fn until_tx_work(&self, limit: Duration) -> Duration {
        if self.shared.tx.is_idle() && self.undecided.is_empty() {
            return limit;
        }
        let looks = self.undecided.iter().map(|u| u.due_at);
        let next = looks.chain(self.shared.tx.has_asks().then_some(self.tx_at)).min();
        next.map_or(limit, |at| at.max(self.tx_at).saturating_duration_since(Instant::now()).min(limit))
    }

    /// Puts outcomes of tasks with claims of their own where they belong: under the number of that claim, or aside, where the handler's
    /// transaction decides.
    pub(super) fn divert(&mut self, ended: &mut Vec<Ended>) {
        if self.shared.tx.is_idle() {
            return;
        }
        for mut one in std::mem::take(ended) {
            let counts = |part: &Part| !(part.was_back && is_return(&one.outcome));
            if let Some(part) = self.shared.tx.take_held(&one.holder, counts) {
                self.forget(one.holder, &part, false);
                one.holder.no = part.no;
                ended.push(one);
            } else if self.shared.tx.get(&one.holder).is_none() {
                ended.push(one);
            } else {
                self.undecided.push(Undecided { ended: one, look: LOOK, due_at: Instant::now() });
            }
        }
    }

    /// Answers who wants to complete a task, and decides what can be decided.
    pub(super) async fn serve_tx(&mut self) {
        match self.try_serve_tx().await {
            Ok(()) => {
                self.tx_backoff.reset();
                self.trouble.end(self.shared, "stores results again");
            }
            Err(e) => {
                if e.is_lost() {
                    self.link = None;
                }
                self.tx_at = Instant::now() + self.tx_backoff.delay();
                let message = format!("can't see to tasks that complete in their handlers' transactions: {e}");
                self.trouble.note(self.shared, &e, message);
            }
        }
        if !self.todo.is_empty() {
            let (count, bytes) = self.todo.iter().fold((0, 0), |sum, (_, f)| (sum.0 + f.count, sum.1 + f.bytes));
            self.store().await;
            self.shared.outcomes.flushed(count, bytes);
        }
    }

    async fn try_serve_tx(&mut self) -> Result<()> {
        let (mut to_part, mut to_settle) = (HashMap::<Holder, Vec<Ask>>::new(), HashMap::<Holder, Vec<Ask>>::new());
        for ask in self.shared.tx.take_asks() {
            let holder = ask.task.holder();
            if self.shared.sched.lock().started(&holder).is_none() && !ask.in_doubt {
                ask.answer(Ok(Answer::Ended));
                continue;
            }
            match self.shared.tx.get(&holder).map(|p| p.state) {
                None | Some(State::Parting) => to_part.entry(holder).or_default().push(ask),
                Some(State::Held) => ask.answer(Ok(Answer::Held)),
                Some(State::Sent | State::Written) => to_settle.entry(holder).or_default().push(ask),
                Some(State::Done) => ask.answer(Ok(Answer::Done)),
            }
        }
        let parted = self.part(to_part).await;
        let settled = match parted {
            Ok(()) => self.settle_asked(&mut to_settle).await,
            Err(e) => Err(e),
        };
        self.shared.tx.put_back(to_settle.into_values().flatten().collect());
        settled?;
        self.decide().await
    }

    /// The consumer's id under which this registration holds its claims.
    fn consumer(&self, epoch: u32) -> i64 {
        self.books.borrow().epochs.get(epoch as usize).copied().unwrap_or(0)
    }

    /// A number for a claim of one task, on the books before it is sent: the heartbeat must not find an orphan.
    fn new_no(books: &mut Books, epoch: u32) -> i64 {
        books.own_no -= 1;
        books.held.insert((epoch, books.own_no), 1);
        books.own_no
    }

    /// Forgets that this task had a claim of its own; settles that claim, too, unless it is still held.
    fn forget(&self, holder: Holder, part: &Part, is_settled: bool) {
        self.shared.tx.remove(&holder);
        let mut books = self.books.borrow_mut();
        books.settle(holder.epoch, holder.no, 1);
        if is_settled {
            books.settle(holder.epoch, part.no, 1);
        }
        books.settle(holder.epoch, part.fresh, 1);
    }

    /// Gives these tasks claims of their own.
    async fn part(&mut self, asked: HashMap<Holder, Vec<Ask>>) -> Result<()> {
        let mut by_epoch: BTreeMap<u32, Vec<(Holder, Vec<Ask>)>> = BTreeMap::new();
        for (holder, asks) in asked {
            by_epoch.entry(holder.epoch).or_default().push((holder, asks));
        }
        while let Some((epoch, members)) = by_epoch.pop_first() {
            let me = self.consumer(epoch);
            for (holder, asks) in &members {
                if self.shared.tx.get(holder).is_none() {
                    let task = asks[0].task.clone();
                    let no = Self::new_no(&mut self.books.borrow_mut(), epoch);
                    let (state, home) = (State::Parting, [0, 0]);
                    let part = Part { task, consumer: me, no, fresh: 0, state, was_back: false, home };
                    self.shared.tx.set(*holder, part);
                }
            }
            let parts: Vec<Part> = members.iter().filter_map(|(h, _)| self.shared.tx.get(h)).collect();
            let nos: Vec<i64> = members.iter().map(|(h, _)| h.no).collect();
            let ids: Vec<i64> = members.iter().map(|(h, _)| h.id).collect();
            let own: Vec<i64> = parts.iter().map(|p| p.no).collect();
            let (is_sent, answer) = match self.connect().await {
                Ok(link) => (true, link.query("part_claims", &[&me, &nos, &ids, &own]).await),
                Err(e) => (false, Err(e)),
            };
            Counters::add(&self.shared.counters.statements, usize::from(is_sent));
            let rows = match answer {
                Ok(rows) => rows,
                Err(e) => {
                    // A refusal says that nothing was done, unless an earlier try is in doubt.
                    let mut later = Vec::new();
                    for ((holder, mut asks), part) in members.into_iter().zip(parts) {
                        if asks.iter().any(|a| a.in_doubt) || (is_sent && e.is_lost()) {
                            for ask in &mut asks {
                                ask.in_doubt = true;
                            }
                            later.extend(asks);
                        } else if !is_sent {
                            self.unpart(holder, &part);
                            later.extend(asks);
                        } else {
                            self.unpart(holder, &part);
                            for ask in asks {
                                ask.answer(Err(e.clone()));
                            }
                        }
                    }
                    later.extend(by_epoch.into_values().flatten().flat_map(|(_, asks)| asks));
                    self.shared.tx.put_back(later);
                    return Err(e);
                }
            };
            let home = rows.first().map_or([0, 0], |r| [r.get(1), r.get(2)]);
            let there: Vec<i64> = rows.iter().map(|r| r.get(0)).collect();
            for ((holder, asks), part) in members.into_iter().zip(parts) {
                let is_held = there.contains(&part.no);
                if is_held {
                    self.shared.tx.change(&holder, |part| (part.state, part.home) = (State::Held, home));
                } else {
                    self.unpart(holder, &part);
                    part.task.lose();
                }
                let answer = if is_held { Answer::Held } else { Answer::Lost };
                for ask in asks {
                    ask.answer(Ok(answer));
                }
            }
        }
        Ok(())
    }

    /// There is no claim of its own: what becomes of the run goes by the claim that brought the task.
    fn unpart(&self, holder: Holder, part: &Part) {
        self.shared.tx.remove(&holder);
        let mut books = self.books.borrow_mut();
        for no in [part.no, part.fresh] {
            books.settle(holder.epoch, no, 1);
        }
    }

    /// Answers who wants to complete a task once more.
    async fn settle_asked(&mut self, asked: &mut HashMap<Holder, Vec<Ask>>) -> Result<()> {
        let holders: Vec<Holder> = asked.keys().copied().collect();
        for (holder, end) in self.find_ends(&holders).await? {
            let answer = match (end, self.shared.tx.get(&holder)) {
                (End::Open, _) => Answer::Open,
                (End::Back, _) => Answer::Held,
                (End::Done, Some(_)) => {
                    self.shared.tx.change(&holder, |part| part.state = State::Done);
                    Answer::Done
                }
                (End::Lost, Some(part)) => {
                    self.unpart(holder, &part);
                    part.task.lose();
                    Answer::Lost
                }
                (End::Done | End::Lost, None) => Answer::Lost,
            };
            for ask in asked.remove(&holder).into_iter().flatten() {
                ask.answer(Ok(answer));
            }
        }
        Ok(())
    }

    /// What these tasks' transactions have come to. Where one was rolled back its claim has a new number, and the task is held again.
    async fn find_ends(&mut self, holders: &[Holder]) -> Result<Vec<(Holder, End)>> {
        let mut ends = Vec::new();
        let mut by_epoch: BTreeMap<u32, Vec<(Holder, Part)>> = BTreeMap::new();
        for holder in holders {
            let number = |part: &mut Part| {
                if part.fresh == 0 {
                    part.fresh = Self::new_no(&mut self.books.borrow_mut(), holder.epoch);
                }
            };
            let Some(part) = self.shared.tx.change(holder, number) else { continue };
            by_epoch.entry(holder.epoch).or_default().push((*holder, part));
        }
        for (epoch, members) in by_epoch {
            let me = self.consumer(epoch);
            let nos: Vec<i64> = members.iter().map(|(_, p)| p.no).collect();
            let ids: Vec<i64> = members.iter().map(|(h, _)| h.id).collect();
            let fresh: Vec<i64> = members.iter().map(|(_, p)| p.fresh).collect();
            let rows = self.connect().await?.query("settle_tx", &[&me, &nos, &ids, &fresh]).await?;
            Counters::add(&self.shared.counters.statements, 1);
            let found: HashMap<i64, String> = rows.iter().map(|r| (r.get(0), r.get(1))).collect();
            for (holder, part) in members {
                // The state as it is now: the statement's answer may have come meanwhile.
                let is_written = self.shared.tx.get(&holder).is_some_and(|p| p.state == State::Written);
                let end = match found.get(&part.no).map(String::as_str) {
                    Some("done") => End::Done,
                    Some("missing") if is_written => End::Done,
                    Some("open") => End::Open,
                    Some("back") => End::Back,
                    _ => End::Lost,
                };
                if end == End::Back {
                    self.books.borrow_mut().settle(epoch, part.no, 1);
                    self.shared.tx.change(&holder, |now| {
                        (now.no, now.fresh, now.state, now.was_back) = (part.fresh, 0, State::Held, true);
                    });
                }
                ends.push((holder, end));
            }
        }
        Ok(ends)
    }

    /// Decides what becomes of tasks whose handlers have ended, where their transactions have ended, too.
    async fn decide(&mut self) -> Result<()> {
        let now = Instant::now();
        let due: Vec<Holder> = self.undecided.iter().filter(|u| u.due_at <= now).map(|u| u.ended.holder).collect();
        let state = |holder: &Holder| self.shared.tx.get(holder).map(|p| p.state);
        let sent = |holder: &&Holder| matches!(state(holder), Some(State::Sent | State::Written));
        let to_find: Vec<Holder> = due.iter().filter(sent).copied().collect();
        let ends: HashMap<Holder, End> = self.find_ends(&to_find).await?.into_iter().collect();
        let mut flushes: BTreeMap<u32, Flush> = BTreeMap::new();
        for mut one in std::mem::take(&mut self.undecided) {
            let holder = one.ended.holder;
            let part = self.shared.tx.get(&holder);
            let end = match (ends.get(&holder), part.as_ref().map(|p| p.state)) {
                (Some(end), _) => Some(*end),
                (None, Some(State::Done)) => Some(End::Done),
                (None, Some(State::Held)) => Some(End::Back),
                // Its own claim was never made.
                (None, None) => None,
                (None, Some(_)) => Some(End::Open),
            };
            match (end, part) {
                (Some(End::Open), _) => {
                    if due.contains(&holder) {
                        one.due_at = now + one.look;
                        one.look = (one.look * 2).min(LOOK_AT_MOST);
                    }
                    self.undecided.push(one);
                }
                (Some(End::Back), Some(_)) => self.take_back_tx(one, &mut flushes),
                (Some(End::Done), Some(part)) => self.count_done(&one.ended, &part),
                (Some(End::Lost), Some(part)) => self.count_lost(&one.ended, &part),
                (_, None) | (None, _) => self.put_into(&mut flushes, one.ended),
            }
        }
        self.todo.extend(flushes.into_iter().filter(|(_, flush)| flush.count > 0));
        Ok(())
    }

    /// No transaction is to complete it: the handler's outcome counts, but that it returned is no completion where one was rolled back.
    fn take_back_tx(&mut self, one: Undecided, flushes: &mut BTreeMap<u32, Flush>) {
        let mut ended = one.ended;
        let returned = is_return(&ended.outcome);
        // Not back, but never sent: the handler ended while its claim was being made.
        if let Some(part) = self.shared.tx.take_held(&ended.holder, |part| !(part.was_back && returned)) {
            self.forget(ended.holder, &part, false);
            ended.holder.no = part.no;
            self.put_into(flushes, ended);
            return;
        }
        let mut part = None;
        self.shared.tx.change(&ended.holder, |now| {
            if now.state == State::Held {
                now.was_back = false;
                part = Some(now.clone());
            }
        });
        if let Some(part) = part {
            let id = ended.holder.id;
            let message = format!(
                "task {id}: its handler returned, but the transaction that was to complete it (complete_tx) was rolled back"
            );
            self.shared.log(Level::Debug, "completer", message);
            self.shared.expiring.fetch_add(1, Ordering::AcqRel);
            self.shared.tx.add_undone(Undone { task: part.task, took_us: ended.took_us });
            self.shared.outcomes.flushed(1, ended.bytes());
            self.shared.outbox.poke();
        } else {
            // What its handler left running has another transaction complete it: that one decides.
            self.undecided.push(Undecided { ended, ..one });
        }
    }

    fn put_into(&self, flushes: &mut BTreeMap<u32, Flush>, ended: Ended) {
        if matches!(ended.outcome, Outcome::Dropped) {
            self.books.borrow_mut().settle(ended.holder.epoch, ended.holder.no, 1);
            self.shared.outcomes.flushed(1, 0);
        } else {
            flushes.entry(ended.holder.epoch).or_default().add(ended);
        }
    }

    fn count_done(&self, ended: &Ended, part: &Part) {
        self.forget(ended.holder, part, true);
        Counters::add(&self.shared.counters.completed, 1);
        self.shared.outcomes.flushed(1, ended.bytes());
        let id = ended.holder.id;
        let but = match &ended.outcome {
            Outcome::Failed(failure) => format!("its handler ended with {}", failure.error),
            Outcome::Snoozed(_) => "its handler then asked to be run again".to_owned(),
            _ => return,
        };
        let message = format!(
            "task {id} is completed by its transaction (complete_tx), though {but}: it neither failed nor runs again"
        );
        self.shared.log(Level::Error, "completer", message);
    }

    fn count_lost(&self, ended: &Ended, part: &Part) {
        self.forget(ended.holder, part, true);
        self.shared.outcomes.flushed(1, ended.bytes());
        if !matches!(ended.outcome, Outcome::Dropped) {
            Counters::add(&self.shared.counters.refused, 1);
            let id = ended.holder.id;
            let message = format!("1 results were refused: the tasks are no longer ours (ids {id})");
            self.shared.log(Level::Warning, "completer", message);
        }
    }

    /// Out of time: whose transactions are still open is for these to say, and for whoever rescues what they roll back.
    pub(super) fn name_undecided(&mut self) {
        let ids: Vec<i64> = std::mem::take(&mut self.undecided).iter().map(|u| u.ended.holder.id).collect();
        if !ids.is_empty() {
            let message = format!(
                "waits no longer for the transactions that are to complete {} tasks: those that are rolled back will run again (ids {})",
                ids.len(),
                crate::engine::consume::trouble::some_of(&ids)
            );
            self.shared.log(Level::Warning, "completer", message);
        }
    }
}

/// Whether the handler returned.
fn is_return(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Completed | Outcome::Returned(_))
}
