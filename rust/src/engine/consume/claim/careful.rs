//! Claims of tasks that were lost before: track 2 into free slots alone, tracks 3 and 4 while nothing else runs.
//!
//! What is lost on track 2 is charged as on track 0, by what the last heartbeat named: a killer may have been started a moment ago, and
//! ended all that was claimed beside it before it began. Whether such a task ran is not known. It is not charged, and runs alone with that
//! debt (track 4), which it pays if it is lost again: then nothing else in the process was to blame. So no innocent is charged for a run
//! that it did not start beside a killer, and a killer still starts at most `max_attempts` + 1 times.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::engine::consume::Phase;
use crate::engine::consume::claim::{Asked, Brought, CLAIM_BYTES, Claimer, saturating};
use crate::engine::consume::moment::Moment;
use crate::engine::error::Result;

/// How long nothing starts, at first and at most, while a task waits to run alone.
pub(super) const HOLD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const CAREFUL: &[i16] = &[2];
const ALONE: &[i16] = &[4, 3];

impl Claimer<'_> {
    /// One claim a lane and step, so that the others are not kept waiting. True: the database answered.
    pub(super) async fn claim_careful(&mut self) -> Result<bool> {
        let (careful, alone) = {
            let mut books = self.books.borrow_mut();
            (std::mem::take(&mut books.careful_lanes), std::mem::take(&mut books.alone_lanes))
        };
        let mut answered = false;
        for id in careful {
            let Some(at) = self.lanes.iter().position(|l| l.id == id) else { continue };
            let slots = self.shared.sched.lock().reserve(self.lanes[at].kind, self.shared.settings.concurrency);
            if slots > 0 {
                let brought = self.claim_tracks(at, CAREFUL, slots).await;
                self.shared.sched.lock().release(slots);
                self.shared.spread();
                answered = true;
                if brought?.tasks == 0 {
                    continue;
                }
            }
            // Where there was one there may be more, once these have slots.
            self.books.borrow_mut().careful_lanes.push(id);
        }
        if self.books.borrow().careful_lanes.is_empty() {
            self.shared.sched.lock().release_saved();
        }
        for id in alone {
            if let Some(at) = self.lanes.iter().position(|l| l.id == id) {
                let ran = self.run_alone(at).await;
                // Also after an error: else nothing would ever start here again.
                self.shared.sched.lock().release_alone();
                self.shared.spread();
                answered |= ran?;
            }
        }
        Ok(answered)
    }

    /// Claims and runs what waits in this lane to run alone, one after the other. True: the database answered.
    async fn run_alone(&mut self, at: usize) -> Result<bool> {
        if Instant::now() < self.hold_after {
            return Ok(false);
        }
        let until = Instant::now() + self.hold;
        let mut answered = false;
        while self.shared.phase() == Phase::Running && self.shared.may_start(Moment::now()) {
            // Stored, too: a result still on its way would be charged as lost if this task kills the process.
            let quiet = self.shared.sched.lock().hold_for_alone() && self.shared.outcomes.unflushed() == 0;
            if quiet {
                let brought = self.claim_tracks(at, ALONE, 1).await?;
                answered = true;
                if brought.tasks == 0 {
                    break;
                }
                self.hold = HOLD.0;
                while self.shared.phase() == Phase::Running && self.shared.sched.lock().is_busy_alone() {
                    sleep(Duration::from_millis(1)).await;
                }
            } else if Instant::now() > until && !answered {
                // Long handlers run here: give way, and wait longer the next time. Another worker may be quiet sooner.
                self.hold_after = Instant::now() + self.hold * 4;
                self.hold = (self.hold * 2).min(HOLD.1);
                break;
            } else {
                sleep(Duration::from_millis(1)).await;
            }
        }
        Ok(answered)
    }

    async fn claim_tracks(&mut self, at: usize, tracks: &[i16], tasks: usize) -> Result<Brought> {
        let count = saturating(tasks);
        let mut asked = Asked { tasks: count, bytes: saturating(CLAIM_BYTES), limit: count, ..Asked::default() };
        for &track in tracks {
            asked.push(&self.lanes[at], track, 0, 0, tasks, count);
        }
        loop {
            if let Some(brought) = self.claim_or_search(&mut asked).await? {
                return Ok(brought);
            }
        }
    }
}
