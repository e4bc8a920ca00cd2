//! Single enqueues, coalesced: a flight leaves at once when none is under way, and gathers while one is.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::error::{Error, Result};
use crate::engine::produce::answer::Reply;
use crate::engine::produce::flight::{self, Manner};
use crate::engine::produce::shared::{Line, Shared};
use crate::engine::produce::task::NewTask;

/// Tasks of one flight.
const FLIGHT_TASKS: usize = 500;
/// Payload bytes of one flight.
const FLIGHT_BYTES: usize = 1024 * 1024;
/// How long a flight waits for a token that somebody's open transaction holds; with the search for the one that is to blame, single
/// enqueues stand still for less than 2 s.
const TOKEN_WAIT: Duration = Duration::from_millis(1_500);
/// The same while looking for the one that is to blame.
const SEARCH_WAIT: Duration = Duration::from_millis(25);
/// The same for one of several that wait apart.
const PARKED_WAIT: Duration = Duration::from_millis(200);

/// One call: all of its tasks go in together or none.
#[derive(Debug)]
pub(super) struct Unit {
    tasks: Vec<NewTask>,
    reply: Reply,
    pushed_at: Instant,
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
    units: std::collections::VecDeque<Unit>,
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
        drop(waiting);
        self.news.notify_one();
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

    /// The next flight's calls; none: closed.
    async fn next(&self) -> Option<Vec<Unit>> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                let units = take_flight(&mut waiting.units);
                if !units.is_empty() {
                    return Some(units);
                }
                if waiting.is_closed {
                    return None;
                }
            }
            self.news.notified().await;
        }
    }
}

fn take_flight(waiting: &mut std::collections::VecDeque<Unit>) -> Vec<Unit> {
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
    let mut parked = tokio::task::JoinSet::new();
    while let Some(units) = inbox.next().await {
        for unit in fly(&shared, units).await {
            if parking.push(unit) {
                parked.spawn(wait_apart(Arc::clone(&shared), Arc::clone(&parking)));
            }
        }
    }
    while parked.join_next().await.is_some() {}
}

/// Sends calls in one flight, or in several where something is wrong with some of them; gives back those that wait for a token.
async fn fly(shared: &Arc<Shared>, units: Vec<Unit>) -> Vec<Unit> {
    let mut blocked = Vec::new();
    let mut stack = vec![(units, TOKEN_WAIT)];
    while let Some((mut units, lock_timeout)) = stack.pop() {
        let Some(oldest) = units.iter().map(|u| u.pushed_at).min() else { continue };
        let deadline = oldest + shared.settings.connect_timeout;
        let manner = Manner { line: &shared.direct, lock_timeout, deadline };
        match send(shared, &units, &manner).await {
            Ok(answers) => deliver(units, answers),
            Err(e) if e.sqlstate() == Some("55P03") => {
                let (tokens, plain): (Vec<_>, Vec<_>) = units.into_iter().partition(Unit::has_tokens);
                let mut tokens = tokens;
                if plain.is_empty() && tokens.len() == 1 {
                    blocked.append(&mut tokens);
                    continue;
                }
                let right = tokens.split_off(tokens.len() / 2);
                stack.extend([right, tokens, plain].map(|units| (units, SEARCH_WAIT)));
            }
            Err(e) if e.is_lost() => {
                // Those that came while others waited have their own time limit.
                let late =
                    |u: &Unit| is_in_doubt(&e) || u.pushed_at + shared.settings.connect_timeout <= Instant::now();
                let (late, rest): (Vec<_>, Vec<_>) = units.into_iter().partition(late);
                let is_stuck = late.is_empty();
                refuse(late, &e);
                if is_stuck {
                    refuse(rest, &e);
                } else {
                    stack.push((rest, lock_timeout));
                }
            }
            // What the server says of one call must not hurt the others.
            Err(_) if units.len() > 1 => {
                let right = units.split_off(units.len() / 2);
                stack.extend([(right, lock_timeout), (units, lock_timeout)]);
            }
            Err(e) => refuse(units, &e),
        }
    }
    blocked
}

fn is_in_doubt(e: &Error) -> bool {
    matches!(e.kind, crate::engine::error::Kind::ConnectionLost { in_doubt: true })
}

async fn send(shared: &Arc<Shared>, units: &[Unit], manner: &Manner<'_>) -> Result<Vec<(i64, bool)>> {
    let tasks: Vec<_> = units.iter().flat_map(|u| &u.tasks).collect();
    flight::send(shared, &tasks, manner).await
}

fn deliver(units: Vec<Unit>, answers: Vec<(i64, bool)>) {
    let mut answers = answers.into_iter();
    for unit in units {
        let own = answers.by_ref().take(unit.tasks.len()).collect();
        unit.reply.send(Ok(own));
    }
}

fn refuse(units: Vec<Unit>, e: &Error) {
    for unit in units {
        unit.reply.send(Err(e.clone()));
    }
}

/// Calls that wait for a token in somebody's open transaction, apart from all others.
#[derive(Debug, Default)]
struct Parking {
    units: Mutex<(Vec<Unit>, bool)>,
}

impl Parking {
    /// Adds one; true: nobody attends to them yet.
    fn push(&self, unit: Unit) -> bool {
        let mut units = self.units.lock();
        units.0.push(unit);
        !mem::replace(&mut units.1, true)
    }

    fn take(&self) -> Vec<Unit> {
        let mut units = self.units.lock();
        let taken = mem::take(&mut units.0);
        units.1 = !taken.is_empty();
        taken
    }
}

/// Tries parked calls in turn, each in a transaction of its own, on a connection that is closed when none is left.
async fn wait_apart(shared: Arc<Shared>, parking: Arc<Parking>) {
    let line = Line::default();
    loop {
        let units = parking.take();
        if units.is_empty() {
            return;
        }
        let lock_timeout = if units.len() == 1 { TOKEN_WAIT } else { PARKED_WAIT };
        for unit in units {
            let until = unit.pushed_at + shared.settings.statement_timeout;
            let manner = Manner { line: &line, lock_timeout, deadline: shared.connect_deadline() };
            let units = [unit];
            let result = send(&shared, &units, &manner).await;
            let [unit] = units;
            match result {
                Ok(answers) => deliver(vec![unit], answers),
                Err(e) if e.sqlstate() == Some("55P03") && Instant::now() < until => drop(parking.push(unit)),
                Err(mut e) => {
                    if e.sqlstate() == Some("55P03") {
                        e.message = format!("another open transaction holds the idempotency token: {}", e.message);
                    }
                    unit.reply.send(Err(e));
                }
            }
        }
    }
}
