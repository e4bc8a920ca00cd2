//! Delays between attempts, and the random numbers that spread them.

use std::time::Duration;

/// Delays between attempts to connect: doubling from 50 ms to 5 s, each cut by a random part of up to half, so that a fleet does not
/// come back in step.
#[derive(Debug, Default)]
pub struct Backoff {
    attempt: u32,
}

impl Backoff {
    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let full = Duration::from_millis(50).saturating_mul(1 << self.attempt.min(7)).min(Duration::from_secs(5));
        self.attempt += 1;
        full.mul_f64(1.0 - random_f64() / 2.0)
    }

    /// Start over after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// 64 random bits from the standard library's seeded hasher: good enough for ids and jitter, and no dependency.
pub fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u128(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos()));
    hasher.finish()
}

/// Uniform in [0, 1).
#[allow(clippy::cast_precision_loss, reason = "53 bits fit")]
pub fn random_f64() -> f64 {
    (random_u64() >> 11) as f64 / (1u64 << 53) as f64
}
