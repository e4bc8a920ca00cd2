//! What the loops of the I/O thread know of each other's claims.

use std::collections::HashMap;

/// Claims held, registrations, and what the control loop has seen for the claimer. Lives on the I/O thread alone.
#[derive(Debug, Default)]
pub struct Books {
    /// Consumer ids, one a registration; the last is the present one.
    pub epochs: Vec<i64>,
    /// Tasks still in flight by registration and claim number.
    pub held: HashMap<(u32, i64), u64>,
    /// The last claim number used; grows before each send, so that none is ever used twice.
    pub last_no: i64,
    /// The claim number before those of the claim under way.
    pub claiming_after: Option<i64>,
    /// The highest lane id that a tick has seen.
    pub last_lane: i32,
    /// A tick has seen a lane that was not there before.
    pub lanes_changed: bool,
    /// Lanes that a notification named since the claimer looked.
    pub notified: Vec<i32>,
    /// Lanes with tasks on tracks 2 and 3.
    pub careful_lanes: Vec<i32>,
    /// The claimer has ended.
    pub claimer_ended: bool,
    /// All outcomes are stored and no more will come.
    pub completer_ended: bool,
}

impl Books {
    /// The present registration.
    pub fn epoch(&self) -> u32 {
        u32::try_from(self.epochs.len()).unwrap_or(u32::MAX).saturating_sub(1)
    }

    /// The present consumer id.
    pub fn me(&self) -> i64 {
        self.epochs.last().copied().unwrap_or(0)
    }

    /// `count` tasks of a claim are no longer in flight.
    pub fn settle(&mut self, epoch: u32, no: i64, count: u64) {
        if let Some(left) = self.held.get_mut(&(epoch, no)) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.held.remove(&(epoch, no));
            }
        }
    }

    /// Claims that the database says we hold and we know nothing of: their answers were lost. One under way is not among them.
    pub fn orphans(&self, held: &[i64], claiming_after: Option<i64>) -> Vec<i64> {
        let epoch = self.epoch();
        let known = |no: &i64| self.held.contains_key(&(epoch, *no)) || claiming_after.is_some_and(|after| *no > after);
        held.iter().copied().filter(|no| !known(no)).collect()
    }
}
