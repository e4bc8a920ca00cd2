//! Tasks that their claims no longer hold, since a client cancelled them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::sched::{Message, Sched};
use crate::engine::consume::task::{Holder, Task};
use crate::engine::wire::IdSet;

/// What was here of them.
#[derive(Debug, Default)]
pub struct Lost {
    /// Handlers at work, by their tasks' ids.
    pub running: Vec<i64>,
    /// Not started, and taken away.
    pub unstarted: Vec<Holder>,
}

impl Sched {
    /// The claims of one registration with handlers that have been at work for `least`; none, where none has been for `age`.
    pub fn long_claims(&self, epoch: u32, now: Moment, least: Duration, age: Duration) -> BTreeSet<i64> {
        let threads = self.slots.iter().filter_map(|s| s.current());
        let runs = self.runs.values().filter_map(|r| Some((r.task.holder(), r.started?)));
        let (mut claims, mut is_due) = (BTreeSet::new(), false);
        for (holder, started) in threads.chain(runs) {
            let time = now.since(started);
            if holder.epoch == epoch && time >= least {
                is_due |= time >= age;
                claims.insert(holder.no);
            }
        }
        if is_due { claims } else { BTreeSet::new() }
    }

    /// What these claims of one registration hold now: other tasks of theirs are gone. What of them has not started is taken out, and
    /// what runs is told so. They were asked about when all of their tasks were here, so what is still here and not held was taken away.
    pub fn lose(&mut self, epoch: u32, held: &HashMap<i64, IdSet>) -> Lost {
        let is_gone = |task: &Task| {
            task.chunk.epoch == epoch && held.get(&task.chunk.no).is_some_and(|ids| !ids.contains(task.id()))
        };
        let mut lost = Lost::default();
        let mut queued: Vec<Task> = Vec::new();
        for kind in &mut self.kinds {
            if kind.queue.iter().any(is_gone) {
                let (gone, left): (VecDeque<Task>, _) = std::mem::take(&mut kind.queue).into_iter().partition(is_gone);
                queued.extend(gone);
                kind.queue = left;
            }
        }
        for task in &queued {
            self.unbuffer(task);
        }
        lost.unstarted.extend(queued.iter().map(Task::holder));
        for slot in &self.slots {
            let (unstarted, running) = slot.lose(is_gone);
            lost.unstarted.extend(unstarted.iter().map(Task::holder));
            lost.running.extend(running.iter().map(Task::id));
        }
        let is_gone_start = |message: &Message| matches!(message, Message::Start(_, task) if is_gone(task));
        let (starts, left): (VecDeque<_>, _) = std::mem::take(&mut self.inbox).into_iter().partition(is_gone_start);
        self.inbox = left;
        let fetched =
            self.runs.extract_if(|_, run| run.started.is_none() && is_gone(&run.task)).map(|(_, run)| run.task);
        let mut fed: Vec<Task> = fetched.collect();
        fed.extend(starts.into_iter().filter_map(|m| if let Message::Start(_, task) = m { Some(task) } else { None }));
        for task in fed {
            self.ended(task.chunk.kind);
            lost.unstarted.push(task.holder());
        }
        for (number, run) in &self.runs {
            if is_gone(&run.task) && run.task.lose() {
                lost.running.push(run.task.id());
                self.inbox.push_back(Message::Interrupt(*number, run.task.clone()));
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::consume::outcomes::Outcomes;
    use crate::engine::consume::sched::{Begun, Kind, Next, Take};
    use crate::engine::consume::task::{Chunk, Outcome};

    const SECOND: Duration = Duration::from_secs(1);
    const HALF: Duration = Duration::from_millis(500);

    fn sched(is_async: bool, concurrency: usize, timeout: Option<Duration>) -> Sched {
        let kind = Kind { name: "t".into(), is_async, workers: concurrency, timeout, result_ttl: None };
        Sched::new(vec![kind], concurrency, 1_000, 1 << 20)
    }

    fn push(sched: &mut Sched, no: i64, ids: std::ops::Range<i64>) {
        let mut chunk = Chunk::new(0, no, 0, Arc::from("default"), 0, 0, 3);
        for id in ids {
            chunk.push(id, 0, b'j', b"{}");
        }
        assert!(sched.push(&Arc::new(chunk)));
    }

    fn held(no: i64, ids: &[i64]) -> HashMap<i64, IdSet> {
        HashMap::from([(no, IdSet::from_ids(&mut ids.to_vec()))])
    }

    fn ids(holders: &[Holder]) -> Vec<i64> {
        holders.iter().map(|h| h.id).collect()
    }

    #[test]
    fn nothing_is_asked_about_while_all_handlers_are_shorter() {
        let mut sched = sched(false, 4, None);
        push(&mut sched, 1, 0..1);
        push(&mut sched, 2, 1..2);
        let (first, second) = (sched.join_thread(), sched.join_thread());
        let start = Moment::now();
        let claims = |sched: &Sched, now| sched.long_claims(0, now, HALF, SECOND).into_iter().collect::<Vec<_>>();
        assert_eq!(sched.take(&first, None, true), Take::Batch(0));
        assert!(matches!(first.begin(start, || true), Next::Run(_)));
        assert_eq!(claims(&sched, start + HALF), [0; 0]);
        assert_eq!(claims(&sched, start + SECOND), [1]);
        // Asked at all, and with it those that would be too old at the next time.
        assert_eq!(sched.take(&second, None, true), Take::Batch(0));
        assert!(matches!(second.begin(start + HALF, || true), Next::Run(_)));
        assert_eq!(claims(&sched, start + SECOND), [1, 2]);
        assert_eq!(sched.long_claims(1, start + SECOND, HALF, SECOND).len(), 0, "of another registration");
        first.finish(start + SECOND, Outcome::Completed);
        assert_eq!(claims(&sched, start + SECOND), [0; 0]);
    }

    #[test]
    fn what_a_thread_has_not_started_is_taken_out_and_what_runs_is_told_once() {
        let mut sched = sched(false, 1, None);
        push(&mut sched, 1, 0..40);
        let slot = sched.join_thread();
        sched.learn(0, 1, Duration::from_micros(1));
        assert_eq!(sched.take(&slot, None, true), Take::Batch(0));
        let Next::Run(running) = slot.begin(Moment::now(), || true) else { panic!("it has a batch") };
        assert_eq!((running.id(), sched.buffered()), (0, 8));
        // One that runs, some that the thread took, some that wait.
        let lost = sched.lose(0, &held(1, &[1, 2, 5, 30, 33]));
        assert_eq!((lost.running, lost.unstarted.len()), (vec![0], 34));
        assert!(running.is_lost());
        assert_eq!((sched.buffered(), sched.running()), (1, 1));
        let again = sched.lose(0, &held(1, &[1, 2, 5, 30, 33]));
        assert_eq!((again.running.len(), again.unstarted.len()), (0, 0));
        assert_eq!(sched.lose(1, &held(1, &[])).unstarted.len(), 0, "another registration's claim");
        assert_eq!(sched.lose(0, &held(2, &[])).unstarted.len(), 0, "another claim");
        let mut left = Vec::new();
        slot.finish(Moment::now(), Outcome::Completed);
        while let Next::Run(task) = slot.begin(Moment::now(), || true) {
            left.push(task.id());
            assert!(!task.is_lost());
            slot.finish(Moment::now(), Outcome::Completed);
        }
        assert_eq!(left, [1, 2, 5, 30]);
    }

    #[test]
    fn a_run_on_a_loop_is_told_and_keeps_its_place_and_others_never_begin() {
        let mut sched = sched(true, 3, None);
        push(&mut sched, 1, 0..5);
        let messages = sched.receive(2, true);
        let [Message::Start(begun, _), Message::Start(fetched, _)] = messages[..] else { panic!("{messages:?}") };
        assert!(matches!(sched.begin_run(begun, Moment::now(), || true), Begun::Run));
        assert_eq!((sched.running(), sched.buffered()), (3, 2));
        let lost = sched.lose(0, &held(1, &[4]));
        let mut gone = ids(&lost.unstarted);
        gone.sort_unstable();
        assert_eq!((lost.running, gone), (vec![0], vec![1, 2, 3]));
        assert!(matches!(sched.begin_run(fetched, Moment::now(), || true), Begun::Gone));
        assert_eq!((sched.running(), sched.buffered()), (1, 1));
        let messages = sched.receive(9, true);
        assert!(matches!(messages[..], [Message::Interrupt(run, _)] if run == begun), "{messages:?}");
        assert!(sched.finish_run(begun, Moment::now()).is_some());
        assert_eq!((sched.running(), sched.buffered()), (1, 0), "the last one is fed");
    }

    #[test]
    fn a_lost_run_whose_time_is_up_is_no_failure() {
        let mut sched = sched(true, 2, Some(SECOND));
        push(&mut sched, 1, 0..2);
        let start = Moment::now();
        for message in sched.receive(2, true) {
            let Message::Start(run, _) = message else { panic!("{message:?}") };
            assert!(matches!(sched.begin_run(run, start, || true), Begun::Run));
        }
        assert_eq!(sched.lose(0, &held(1, &[1])).running, [0]);
        let mut expired = sched.expire(start + SECOND, &Outcomes::default());
        expired.sort_by_key(|e| e.task.id());
        assert_eq!(expired.iter().map(|e| e.was_lost).collect::<Vec<_>>(), [true, false]);
        assert!(expired[1].task.is_lost(), "the other's result counts no longer, either");
    }
}
