//! What is looked at again and again: threads that are stuck, results that lie with them, attempts whose time is up.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::sched::Expired;
use crate::engine::consume::{Phase, Shared};

/// When tasks wait, threads are idle and no batch is taken, those at work are stuck in handlers: one more thread each 2 ms. What they
/// ended before is handed over for them (`Shared::stop` does so for the time after it).
pub(super) async fn threads(shared: &Shared) {
    let mut last = 0;
    while shared.phase() == Phase::Running {
        let is_idle = {
            let sched = shared.sched.lock();
            sched.buffered() == 0 && sched.running() == 0
        };
        tokio::time::sleep(Duration::from_millis(if is_idle { 20 } else { 2 })).await;
        let mut sched = shared.sched.lock();
        sched.hand_over(&shared.outcomes);
        let takes = sched.takes();
        if takes == last && sched.has_waiting() && shared.may_start(Moment::now()) {
            shared.rouse_one(&mut sched);
        }
        last = takes;
    }
}

/// Ends attempts whose time is up.
pub(super) async fn time(shared: &Shared) {
    while shared.phase() < Phase::Abandoned {
        if shared.phase() == Phase::Stopping && shared.running() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut sched = shared.sched.lock();
        if !sched.has_timeouts() {
            continue;
        }
        let expired = sched.expire(Moment::now(), &shared.outcomes);
        let (lost, expired): (Vec<Expired>, Vec<Expired>) = expired.into_iter().partition(|e| e.was_lost);
        for run in &lost {
            shared.outcomes.push(Ended::dropped(run.task.holder()));
        }
        shared.expiring.fetch_add(expired.len(), Ordering::AcqRel);
        drop(sched);
        if expired.is_empty() && lost.is_empty() {
            continue;
        }
        shared.counters.timed_out(expired.len());
        shared.expired.lock().extend(expired);
        shared.outbox.poke();
        shared.spread();
    }
}
