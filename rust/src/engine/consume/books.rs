//! What the loops of the I/O thread know of each other's claims.

use std::collections::{HashMap, HashSet};

/// Claims held, registrations, and what the control loop has seen for the claimer. Lives on the I/O thread alone.
#[derive(Debug, Default)]
pub struct Books {
    /// Consumer ids, one a registration; the last is the present one.
    pub epochs: Vec<i64>,
    /// The registration that was last found gone.
    pub lost: Option<u32>,
    /// Tasks still in flight by registration and claim number.
    pub held: HashMap<(u32, i64), u64>,
    /// The last claim number used; grows before each send, so that none is ever used twice.
    pub last_no: i64,
    /// The last number of a claim of one task for its handler's transaction: these go down from -1. A heartbeat tells which claims it knew by
    /// the highest of their numbers, and what has such a claim of its own had begun.
    pub own_no: i64,
    /// The claim number before those of the claim under way.
    pub claiming_after: Option<i64>,
    /// The highest lane id and the number of lanes that a tick has seen.
    pub lanes: (i32, i64),
    /// A tick has seen a lane that was not there before.
    pub lanes_changed: bool,
    /// Lanes that a notification named since the claimer looked.
    pub notified: Vec<i32>,
    /// Lanes with tasks on track 2.
    pub careful_lanes: Vec<i32>,
    /// Lanes with tasks on track 3 or 4.
    pub alone_lanes: Vec<i32>,
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

    /// Whether the present registration was found gone, and there is no new one yet.
    pub fn is_lost(&self) -> bool {
        self.lost == Some(self.epoch())
    }

    /// Whether what was claimed under this registration may still start here.
    pub fn is_current(&self, epoch: u32) -> bool {
        !self.is_lost() && self.epoch() == epoch
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

    /// What is known when a heartbeat is sent, to judge what it reads back.
    pub fn reckon(&self) -> Reckoning {
        let epoch = self.epoch();
        let held = self.held.keys().filter(|key| key.0 == epoch).map(|key| key.1).collect();
        Reckoning { settled_no: self.claiming_after.unwrap_or(self.last_no), own_no: self.own_no, held }
    }
}

/// The claims that were known when a heartbeat was sent.
#[derive(Debug)]
pub struct Reckoning {
    /// The last claim number whose call had ended: the answers of later ones may be under way.
    settled_no: i64,
    /// The last number of a task's own claim, which go down: of later ones nothing was known.
    own_no: i64,
    held: HashSet<i64>,
}

impl Reckoning {
    /// Of the claims that the database says we hold, those that we should have known of: their answers were lost. One that has been
    /// completed since was known then.
    pub fn orphans(&self, held: &[i64]) -> Vec<i64> {
        let is_old = |no: i64| self.own_no <= no && no <= self.settled_no;
        held.iter().copied().filter(|no| is_old(*no) && !self.held.contains(no)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_began_after_the_heartbeat_was_sent_is_no_orphan() {
        let mut books = Books { epochs: vec![7], last_no: 10, ..Books::default() };
        books.held.insert((0, 3), 5);
        // The heartbeat goes out while nothing is claimed; a claim is sent, stored, and seen by it before its answer is here.
        let before = books.reckon();
        books.claiming_after = Some(10);
        books.last_no = 13;
        assert_eq!(before.orphans(&[3, 11]), Vec::<i64>::new());
        // And one that was under way when the heartbeat went out.
        assert_eq!(books.reckon().orphans(&[3, 11]), Vec::<i64>::new());
        // Its connection broke: the next heartbeat finds it.
        books.claiming_after = None;
        assert_eq!(books.reckon().orphans(&[3, 11]), vec![11]);
    }

    #[test]
    fn a_claim_of_one_task_that_was_made_after_the_heartbeat_was_sent_is_no_orphan() {
        let mut books = Books { epochs: vec![7], last_no: 10, own_no: -2, ..Books::default() };
        books.held.insert((0, -2), 1);
        let before = books.reckon();
        books.own_no = -3;
        books.held.insert((0, -3), 1);
        assert_eq!(before.orphans(&[-3, -2]), Vec::<i64>::new());
        // An earlier one that nobody knows of, and one that is settled by the next heartbeat.
        assert_eq!(before.orphans(&[-1]), vec![-1]);
        books.settle(0, -3, 1);
        assert_eq!(books.reckon().orphans(&[-3, -2]), vec![-3]);
    }

    #[test]
    fn a_claim_that_was_completed_while_the_heartbeat_was_under_way_is_no_orphan() {
        let mut books = Books { epochs: vec![7], last_no: 10, ..Books::default() };
        books.held.insert((0, 3), 5);
        let before = books.reckon();
        books.settle(0, 3, 5);
        assert!(books.held.is_empty());
        assert_eq!(before.orphans(&[3]), Vec::<i64>::new());
    }
}
