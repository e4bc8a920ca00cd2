//! The number of this process, for those who ask once a task whether they were forked.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

/// 0: not asked for yet.
static OWN: AtomicU32 = AtomicU32::new(0);

/// `std::process::id`, without the system call: 0.15 us, a sixth of what a task that does nothing costs its consumer.
pub fn id() -> u32 {
    match OWN.load(Ordering::Relaxed) {
        0 => renew(),
        own => own,
    }
}

/// Asks the system. To be called in each child after a fork, before anything else there asks.
pub fn renew() -> u32 {
    let own = process::id();
    OWN.store(own, Ordering::Relaxed);
    own
}
