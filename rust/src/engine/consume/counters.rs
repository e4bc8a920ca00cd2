//! What the engine did since its start; read by `stats`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the start.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        impl Counters {
            /// All of them by name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Tasks claimed.
    claimed,
    /// Handlers started.
    started,
    /// Completions stored.
    completed,
    /// Failed attempts stored whose task is retried.
    retried,
    /// Failed attempts stored whose task has failed for good.
    failed,
    /// Tasks put off by their handlers.
    snoozed,
    /// Tasks that were claimed and not started in time.
    expired,
    /// Tasks given back unstarted.
    given_back,
    /// Results that no longer counted: the claim did not hold the task any more.
    refused,
    /// Attempts that ran out of time.
    timed_out,
    /// Tasks that were cancelled while they ran here, or waited here to be run.
    cancelled,
    /// Claim statements.
    claims,
    /// Flushes of outcomes.
    flushes,
    /// Statements sent, all in all.
    statements,
    /// Heartbeats stored.
    beats,
    /// Connections made again.
    reconnects,
}

impl Counters {
    /// Adds to one of them.
    pub fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// One of them.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    /// Handlers were started.
    pub fn started(&self, count: usize) {
        Self::add(&self.started, count);
    }

    /// Attempts ran out of time.
    pub fn timed_out(&self, count: usize) {
        Self::add(&self.timed_out, count);
    }
}
