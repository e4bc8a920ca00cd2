//! The clock by which starts are allowed and attempts are timed.

use std::ops::Add;
use std::time::Duration;

/// A moment by a clock of this machine that never goes back, and that goes on while the machine sleeps.
///
/// `Instant` stands still then: a laptop that was shut for an hour would come back with the deadline of its last heartbeat ahead, and start
/// what others have run long ago. A virtual machine that its host paused may see no time pass by any clock of its own. Then only the next
/// heartbeat tells, and what was started before it is refused when it ends, by its claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

#[cfg(any(target_os = "linux", target_os = "android"))]
const CLOCK: libc::clockid_t = libc::CLOCK_BOOTTIME;
// macOS's counts sleep; others have none that does.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC;

impl Moment {
    /// Now. As cheap as `Instant::now`: Linux reads this clock without a system call, too.
    #[allow(unsafe_code, reason = "the standard library reads no clock that counts sleep")]
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec, and the call writes nothing else.
        let failed = unsafe { libc::clock_gettime(CLOCK, &raw mut time) };
        assert_eq!(failed, 0, "this system has no monotonic clock");
        // Neither is ever negative for a clock that counts from the machine's start.
        Self(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
    }

    /// How long after `earlier` it is; nothing, if it lies before.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// As a number that grows with time, for an atomic.
    pub fn as_nanos(self) -> u64 {
        self.0
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_and_never_back() {
        let first = Moment::now();
        let later = Moment::now() + Duration::from_secs(1);
        assert!(later > first);
        assert!(later.since(first) >= Duration::from_secs(1));
        assert_eq!(first.since(later), Duration::ZERO);
        assert_eq!((first + Duration::MAX).as_nanos(), u64::MAX);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn it_counts_the_time_that_the_machine_slept() {
        // The kernel's own figure, in seconds since it started, sleep included.
        let read = || std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = read().split(' ').next().unwrap().parse().unwrap();
        let ours = Duration::from_nanos(Moment::now().as_nanos()).as_secs_f64();
        assert!((ours - uptime).abs() < 5.0, "{ours} and {uptime}");
    }
}
