//! Single enqueues, coalesced: a flight leaves at once when none is under way, and gathers while one is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::answer::Reply;
use crate::engine::produce::flight::{self, Manner, is_blocked};
use crate::engine::produce::parking::{self, Parking};
use crate::engine::produce::shared::Shared;
use crate::engine::produce::task::NewTask;

/// Tasks of one flight.
const FLIGHT_TASKS: usize = 500;
/// Payload bytes of one flight.
const FLIGHT_BYTES: usize = 1024 * 1024;
/// How long a flight waits for a token that somebody's open transaction holds; with the search for the one that is to blame, single
/// enqueues stand still for less than 2 s.
pub(super) const TOKEN_WAIT: Duration = Duration::from_millis(1_500);
/// The same while looking for the one that is to blame: longer than another producer's commit mostly takes.
pub(super) const SEARCH_WAIT: Duration = Duration::from_millis(5);

/// How long the first callers after a flight of several wait for the others; the timer's grain makes it up to 2 ms. With 16 threads it
/// took a sixth off the server's cost of a task, with 64 coroutines a third.
const LINGER: Duration = Duration::from_micros(500);

/// One call: all of its tasks go in together or none.
#[derive(Debug)]
pub(super) struct Unit {
    tasks: Vec<NewTask>,
    reply: Reply,
    pub(super) pushed_at: Instant,
}

impl Unit {
    pub(super) fn new(tasks: Vec<NewTask>, reply: Reply) -> Self {
        Self { tasks, reply, pushed_at: Instant::now() }
    }

    /// Answers that it was not enqueued.
    pub(super) fn refuse(self, e: Error) {
        self.reply.send(Err(e));
    }

    fn bytes(&self) -> usize {
        self.tasks.iter().map(|t| t.payload.len()).sum()
    }

    fn has_tokens(&self) -> bool {
        self.tasks.iter().any(|t| t.token.is_some())
    }
}

#[derive(Debug, Default)]
struct Waiting {
    units: VecDeque<Unit>,
    /// Calls that the I/O thread wants to see before it looks.
    wanted: usize,
    is_closed: bool,
}

/// Calls that wait for the next flight.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    news: Notify,
}

impl Inbox {
    /// Adds a call; gives it back when the producer is closing.
    pub(super) fn push(&self, unit: Unit) -> std::result::Result<(), Unit> {
        let mut waiting = self.waiting.lock();
        if waiting.is_closed {
            return Err(unit);
        }
        waiting.units.push_back(unit);
        if waiting.units.len() >= waiting.wanted {
            drop(waiting);
            self.news.notify_one();
        }
        Ok(())
    }

    /// What is there is still sent; nothing more comes in.
    pub(super) fn close(&self) {
        self.waiting.lock().is_closed = true;
        self.news.notify_one();
    }

    /// The thread has ended: what is left is answered by its drop.
    pub(super) fn end(&self) {
        let mut waiting = self.waiting.lock();
        waiting.is_closed = true;
        waiting.units.clear();
    }

    /// The next flight's calls; none: closed. `last` is how many the last flight had.
    ///
    /// Callers that were answered together come back together: the first of them would fly alone, and the others wait for its return.
    /// So a flight of several is followed by one that waits for as many, but not for long.
    async fn next(&self, last: usize) -> Option<Vec<Unit>> {
        let mut linger = (last > 1).then(|| Box::pin(sleep(LINGER)));
        loop {
            {
                let mut waiting = self.waiting.lock();
                let is_enough = linger.is_none() || waiting.units.len() >= last || waiting.is_closed;
                if is_enough && !waiting.units.is_empty() {
                    waiting.wanted = 0;
                    return Some(take_flight(&mut waiting.units));
                }
                if waiting.is_closed {
                    return None;
                }
                waiting.wanted = if linger.is_some() { last } else { 0 };
            }
            match &mut linger {
                None => self.news.notified().await,
                Some(end) => tokio::select! {
                    () = self.news.notified() => {}
                    () = end => linger = None,
                },
            }
        }
    }
}

fn take_flight(waiting: &mut VecDeque<Unit>) -> Vec<Unit> {
    let (mut tasks, mut bytes, mut n) = (0, 0, 0);
    for unit in waiting.iter() {
        tasks += unit.tasks.len();
        bytes += unit.bytes();
        if n > 0 && (tasks > FLIGHT_TASKS || bytes > FLIGHT_BYTES) {
            break;
        }
        n += 1;
    }
    waiting.drain(..n).collect()
}

/// Sends flights until the inbox is closed and empty.
pub(super) async fn run(shared: Arc<Shared>, inbox: Arc<Inbox>) {
    let parking = Arc::new(Parking::default());
    let mut parked = JoinSet::new();
    let mut last = 0;
    while let Some(units) = inbox.next(last).await {
        last = units.len();
        // While some token is known to be blocked, others wait no more for it: its next task would hold them up again.
        let lock_timeout = if parking.is_busy() { SEARCH_WAIT } else { TOKEN_WAIT };
        for unit in fly(&shared, units, lock_timeout).await {
            if parking.push(unit) {
                parked.spawn(parking::attend(Arc::clone(&shared), Arc::clone(&parking)));
            }
        }
    }
    while parked.join_next().await.is_some() {}
}

/// Sends calls in one flight, or in several where something is wrong with some of them; gives back those that wait for a token.
async fn fly(shared: &Arc<Shared>, units: Vec<Unit>, lock_timeout: Duration) -> Vec<Unit> {
    let limit = shared.settings.connect_timeout;
    let mut blocked = Vec::new();
    let mut stack = vec![(units, lock_timeout)];
    while let Some((mut units, lock_timeout)) = stack.pop() {
        let Some(oldest) = units.iter().map(|u| u.pushed_at).min() else { continue };
        let deadline = oldest + limit;
        let manner = Manner { line: &shared.direct, lock_timeout, deadline };
        match send(shared, &units, &manner).await {
            Ok(answers) => deliver(units, answers),
            Err(e) if is_blocked(&e) => {
                let (mut tokens, plain): (Vec<_>, Vec<_>) = units.into_iter().partition(Unit::has_tokens);
                if plain.is_empty() && tokens.len() == 1 {
                    blocked.append(&mut tokens);
                    continue;
                }
                let right = tokens.split_off(tokens.len() / 2);
                stack.extend([right, tokens, plain].map(|units| (units, SEARCH_WAIT)));
            }
            Err(e) if matches!(e.kind, Kind::ConnectionLost { in_doubt: false }) => {
                // Those that came while others waited have their own time limit.
                let now = Instant::now().max(deadline);
                let (late, rest): (Vec<_>, Vec<_>) = units.into_iter().partition(|u| u.pushed_at + limit <= now);
                refuse(late, &e);
                stack.push((rest, lock_timeout));
            }
            // The call with a duplicate goes alone, after the others: only then is it known whose its token is.
            Err(e) if units.len() > 1 && matches!(e.kind, Kind::Duplicate { .. }) => {
                let at = blamed(&units, &e).0;
                let unit = units.remove(at);
                stack.extend([(vec![unit], lock_timeout), (units, lock_timeout)]);
            }
            Err(e) if matches!(e.kind, Kind::Duplicate { .. }) => {
                let e = blamed(&units, &e).1;
                refuse(units, &e);
            }
            // What the server says of one call's data must not hurt the others.
            Err(e) if units.len() > 1 && is_of_data(&e) => {
                let right = units.split_off(units.len() / 2);
                stack.extend([(right, lock_timeout), (units, lock_timeout)]);
            }
            Err(e) => refuse(units, &e),
        }
    }
    blocked
}

/// SQLSTATE classes that blame values: data, constraints, limits, what a trigger raises, checks of views. And a missing right: to change the
/// task that has a token takes more than to enqueue.
fn is_of_data(e: &Error) -> bool {
    e.sqlstate().is_some_and(|code| ["22", "23", "54", "P0", "44", "42501"].iter().any(|class| code.starts_with(class)))
}

/// Sends calls in one flight.
pub(super) async fn send(shared: &Arc<Shared>, units: &[Unit], manner: &Manner<'_>) -> Result<Vec<(i64, bool)>> {
    let tasks: Vec<_> = units.iter().flat_map(|u| &u.tasks).collect();
    flight::send(shared, &tasks, manner).await
}

/// Which call an error blames whose index is the position in the flight, and the error with the position in the call.
pub(super) fn blamed(units: &[Unit], e: &Error) -> (usize, Error) {
    let mut left = e.index.unwrap_or(0);
    for (at, unit) in units.iter().enumerate() {
        let size = unit.tasks.len() as u64;
        if left < size {
            return (at, e.clone().at(left));
        }
        left -= size;
    }
    (0, e.clone())
}

/// Gives each call its part of the answers.
pub(super) fn deliver(units: Vec<Unit>, answers: Vec<(i64, bool)>) {
    let mut answers = answers.into_iter();
    Reply::send_all(units.into_iter().map(|unit| {
        let own: Vec<(i64, bool)> = answers.by_ref().take(unit.tasks.len()).collect();
        // Alone in its call, a duplicate has kept nothing else from being written.
        let refused = match (&unit.tasks[..], &own[..]) {
            ([task], [(id, false)]) if task.rule.raises() => Some(Error::duplicate(Some(*id))),
            _ => None,
        };
        (unit.reply, refused.map_or(Ok(own), Err))
    }));
}

fn refuse(units: Vec<Unit>, e: &Error) {
    for unit in units {
        unit.refuse(e.clone());
    }
}
