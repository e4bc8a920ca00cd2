//! Calls that wait for a token in somebody's open transaction, apart from all others.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::error::Kind;
use crate::engine::produce::flight::{Manner, is_blocked};
use crate::engine::produce::shared::{Line, Shared};
use crate::engine::produce::single::{SEARCH_WAIT, TOKEN_WAIT, Unit, blamed, deliver, send};

/// How long one of several waits before it is the next one's turn.
const TURN: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct Parked {
    /// Whether each was tried here before.
    units: VecDeque<(Unit, bool)>,
    is_attended: bool,
}

/// The calls that wait.
#[derive(Debug, Default)]
pub(super) struct Parking(Mutex<Parked>);

impl Parking {
    /// Adds a call; true: nobody attends to it yet.
    pub(super) fn push(&self, unit: Unit) -> bool {
        let mut parked = self.0.lock();
        // Ahead of those known to wait: it may have been in the way of a commit for a moment only.
        parked.units.push_front((unit, false));
        !mem::replace(&mut parked.is_attended, true)
    }

    /// Whether any call waits.
    pub(super) fn is_busy(&self) -> bool {
        self.0.lock().is_attended
    }

    /// The next call, whether it was tried before, and whether it is the only one.
    fn next(&self) -> Option<(Unit, bool, bool)> {
        let mut parked = self.0.lock();
        let next = parked.units.pop_front();
        parked.is_attended = next.is_some();
        next.map(|(unit, is_known)| (unit, is_known, parked.units.is_empty()))
    }
}

/// Tries parked calls in turn, each in a transaction of its own, on a connection that is closed when none is left.
pub(super) async fn attend(shared: Arc<Shared>, parking: Arc<Parking>) {
    let line = Line::default();
    while let Some((unit, is_known, is_alone)) = parking.next() {
        let lock_timeout = match (is_known, is_alone) {
            (false, _) => SEARCH_WAIT,
            (true, false) => TURN,
            (true, true) => TOKEN_WAIT,
        };
        let until = unit.pushed_at + shared.settings.statement_timeout;
        let manner = Manner { line: &line, lock_timeout, deadline: shared.connect_deadline() };
        let units = [unit];
        let result = send(&shared, &units, &manner).await;
        let result = match result {
            Err(e) if matches!(e.kind, Kind::Duplicate { .. }) => Err(blamed(&units, &e).1),
            other => other,
        };
        let [unit] = units;
        match result {
            Ok(answers) => deliver(vec![unit], answers),
            Err(e) if is_blocked(&e) && Instant::now() < until => parking.0.lock().units.push_back((unit, true)),
            Err(mut e) => {
                if is_blocked(&e) {
                    e.message = format!("another open transaction holds the idempotency token: {}", e.message);
                }
                unit.refuse(e);
            }
        }
    }
}
