//! Waking consumers after commits: seldom, since NOTIFY takes a lock on the whole server at commit.

use std::collections::BTreeSet;
use std::mem;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::time::sleep;

use crate::engine::produce::shared::{Shared, Stats};
use crate::engine::sql;

/// At most one notification in this many microseconds and process (storage.md, rule 9).
const INTERVAL_US: u64 = 5_000;
/// Lanes in one notification: PostgreSQL takes less than 8,000 bytes, and an `integer` has at most 11 characters and a comma.
pub const LANES: usize = 600;

/// When the process last notified: microseconds after its first, plus [`INTERVAL_US`].
static LAST_US: AtomicU64 = AtomicU64::new(0);

#[derive(Debug, Default)]
struct Pending {
    lanes: BTreeSet<i32>,
    is_scheduled: bool,
}

/// Lanes that have new tasks which no consumer was told of.
#[derive(Debug, Default)]
pub(super) struct Notifier(Mutex<Pending>);

/// Claims the right to notify now; else how long to wait.
fn turn() -> Result<(), Duration> {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    let now = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX - INTERVAL_US) + INTERVAL_US;
    let last = LAST_US.load(Ordering::Relaxed);
    if now < last + INTERVAL_US {
        return Err(Duration::from_micros(last + INTERVAL_US - now));
    }
    // Another producer's thread that was quicker has the turn.
    LAST_US
        .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
        .map(drop)
        .map_err(|_| Duration::from_micros(INTERVAL_US))
}

/// The lanes as text, where the flight that brings them tasks is to notify by itself: nothing is pending, and it is its turn. Consumers
/// then claim while the log is being flushed, a good half of the time until a lone task starts.
pub(super) fn take_turn(shared: &Shared, lanes: &[i32]) -> Option<String> {
    let is_free = shared.settings.notify && lanes.len() <= LANES && !shared.notifier.0.lock().is_scheduled;
    (is_free && turn().is_ok()).then(|| {
        Stats::add(&shared.stats.notifies, 1);
        text_of(lanes)
    })
}

/// These lanes have new tasks. To be called when the commit is on its way on the direct connection: the notification follows on it.
pub(super) fn announce(shared: &Arc<Shared>, lanes: impl Iterator<Item = i32>) {
    if !shared.settings.notify {
        return;
    }
    let mut pending = shared.notifier.0.lock();
    pending.lanes.extend(lanes);
    if pending.lanes.is_empty() || mem::replace(&mut pending.is_scheduled, true) {
        return;
    }
    drop(pending);
    tokio::spawn(flush(Arc::clone(shared)));
}

/// Notifies of all lanes that are pending, when it is its turn.
async fn flush(shared: Arc<Shared>) {
    while let Err(delay) = turn() {
        sleep(delay).await;
    }
    let lanes = {
        let mut pending = shared.notifier.0.lock();
        pending.is_scheduled = false;
        mem::take(&mut pending.lanes)
    };
    send(&shared, lanes).await;
}

/// Notifies of what is pending without waiting for a turn: at the end.
pub(super) async fn flush_last(shared: &Arc<Shared>) {
    let lanes = mem::take(&mut shared.notifier.0.lock().lanes);
    if !lanes.is_empty() {
        send(shared, lanes).await;
    }
}

fn text_of(lanes: &[i32]) -> String {
    lanes.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
}

async fn send(shared: &Arc<Shared>, lanes: BTreeSet<i32>) {
    // A lost notification costs consumers one poll interval: no reason to connect, to repeat, or to fail.
    let Some(link) = shared.direct.open().await else { return };
    let channel = sql::channel(&shared.target.statements.schema);
    let lanes: Vec<_> = lanes.into_iter().collect();
    for lanes in lanes.chunks(LANES) {
        let text = text_of(lanes);
        Stats::add(&shared.stats.statements, 1);
        if link.query("notify_ready", &[&channel, &text]).await.is_ok() {
            Stats::add(&shared.stats.notifies, 1);
        }
    }
}
