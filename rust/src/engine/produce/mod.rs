//! The producer: single enqueues coalesced into flights, and streams of many by COPY, on one native thread.
//!
//! A call encodes its tasks on the caller's thread; the I/O thread gives them ids, writes them and answers when they are durable.
//!
//! | part | what it does |
//! |---|---|
//! | [`task`] | what a task holds, and the limits on it |
//! | [`copy`] | rows for binary COPY, batches, chunks |
//! | [`ids`] | reserved ids, and the compact answer |
//! | `single`, `flight` | single enqueues: who flies together; one flight, its retries and its doubts |
//! | `parking` | single enqueues that wait for somebody's token, apart from the others |
//! | `stream`, `batch`, `handoff` | `enqueue_many`: transactions; one batch; between caller and I/O thread |
//! | `keep` | the batches of an open transaction, for sending it again |
//! | `tokens` | idempotency tokens, always taken in one order |
//! | `swap` | what a task whose token is held brings to the one that holds it |
//! | [`texts`] | parameters of statements that may go over somebody else's connection |
//! | `witness` | what became of a commit whose answer was lost |
//! | [`tx`], [`lend`] | tasks for a transaction on the user's own connection; ids and lanes for them |
//! | `notify` | waking consumers, seldom |
//! | `shared` | connections, reserved ids, known lanes, counters |
//! | [`answer`] | how an answer comes back |

pub mod answer;
mod batch;
pub mod copy;
mod flight;
mod handoff;
pub mod ids;
mod keep;
pub mod lend;
mod notify;
mod parking;
mod shared;
mod single;
mod stream;
mod swap;
pub mod task;
pub mod texts;
mod tokens;
pub mod tx;
mod witness;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::engine::connect::Target;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::logs::Outbox;
use crate::engine::{process, service};

use answer::Reply;
use handoff::Ending;
pub use handoff::Handoff;
pub use notify::LANES as NOTIFY_LANES;
use shared::Shared;
pub use shared::{Settings, Stats};
use single::{Inbox, Unit};
use task::NewTask;

/// Tasks of a batch, at most.
pub const BATCH_TASKS: usize = 10_000;
/// Bytes after which a batch is handed over.
pub const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// A call of this many tasks at most goes in one statement, without COPY.
pub const SMALL_TASKS: usize = 50;
/// And of this many bytes.
pub const SMALL_BYTES: usize = 1024 * 1024;

/// The handle that callers share; any thread may use it. The I/O thread starts at the first use.
#[derive(Debug)]
pub struct Producer {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    thread: Mutex<Option<Running>>,
    /// The process that started the thread; 0: not started.
    pid: AtomicU32,
    is_closed: AtomicBool,
}

/// What the I/O thread is asked to do beside single enqueues.
enum Command {
    /// Serve a stream.
    Stream(Ending),
    /// Anything else; it answers by itself.
    Run(Pin<Box<dyn Future<Output = ()> + Send>>),
}

#[derive(Debug)]
struct Running {
    commands: mpsc::UnboundedSender<Command>,
    thread: JoinHandle<()>,
}

impl Producer {
    /// Connects to nothing yet.
    pub fn new(target: Target, settings: Settings) -> Self {
        Self {
            shared: Arc::new(Shared::new(target, settings)),
            inbox: Arc::default(),
            thread: Mutex::default(),
            pid: AtomicU32::new(0),
            is_closed: AtomicBool::new(false),
        }
    }

    /// All that it was told.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// The schema's name.
    pub fn schema(&self) -> &str {
        &self.shared.target.statements.schema
    }

    /// Counters since the start.
    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    /// Log records for Python.
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.shared.outbox
    }

    /// Refuses use after `close`, and in a child of the process that started it: the child has neither the thread nor the right to the
    /// connections. Nothing here takes a lock, which the fork may have left locked.
    pub fn check(&self) -> Result<()> {
        let (pid, own) = (self.pid.load(Ordering::Relaxed), process::id());
        if pid != 0 && pid != own {
            let message = format!(
                "this producer was started in process {pid} and is used in its forked child {own}: make a new Producer there"
            );
            return Err(Error::new(Kind::Enqueue, message));
        }
        if self.is_closed.load(Ordering::Relaxed) {
            return Err(closed());
        }
        Ok(())
    }

    /// Enqueues `tasks`, all in one transaction or none; the answer comes by `reply`.
    pub fn enqueue(&self, tasks: Vec<NewTask>, reply: Reply) -> Result<()> {
        self.start(|_| ())?;
        if let Err(unit) = self.inbox.push(Unit::new(tasks, reply)) {
            unit.refuse(closed());
        }
        Ok(())
    }

    /// Begins a stream.
    pub fn stream(&self) -> Result<Arc<Handoff>> {
        let handoff = Arc::new(Handoff::default());
        self.start(|running| running.commands.send(Command::Stream(Ending::new(Arc::clone(&handoff)))))?
            .map_err(|_| closed())?;
        Ok(handoff)
    }

    /// Runs `then` with the thread, started now if it is not.
    fn start<T>(&self, then: impl FnOnce(&Running) -> T) -> Result<T> {
        self.check()?;
        let mut running = self.thread.lock();
        if running.is_none() {
            // `close` takes the thread under this lock: after it nothing starts again.
            if self.is_closed.load(Ordering::Relaxed) {
                return Err(closed());
            }
            let (sender, commands) = mpsc::unbounded_channel();
            let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(&self.inbox));
            let main = move || run(shared, inbox, commands);
            let inbox = Arc::clone(&self.inbox);
            let thread = service::spawn("fastq-io", Arc::clone(self.outbox()), main, move |_| inbox.end())?;
            self.pid.store(process::id(), Ordering::Relaxed);
            *running = Some(Running { commands: sender, thread });
        }
        let running = running.as_ref().ok_or_else(closed)?;
        Ok(then(running))
    }

    /// Takes no more calls; what is under way is finished. Returns the thread to join.
    pub fn close(&self) -> Option<JoinHandle<()>> {
        if self.pid.load(Ordering::Relaxed) != 0 && self.check().is_err() {
            return None;
        }
        self.is_closed.store(true, Ordering::Relaxed);
        let running = self.thread.lock().take();
        self.inbox.close();
        if running.is_none() {
            self.outbox().end();
        }
        running.map(|running| running.thread)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Not joined: that could take as long as a statement. The thread ends by itself when it is through.
        drop(self.close());
    }
}

fn closed() -> Error {
    Error::new(Kind::Enqueue, "the producer is closed")
}

/// The I/O thread's life.
async fn run(shared: Arc<Shared>, inbox: Arc<Inbox>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut singles = tokio::spawn(single::run(Arc::clone(&shared), Arc::clone(&inbox)));
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Stream(ending)) => drop(streams.spawn(stream::run(Arc::clone(&shared), ending))),
                Some(Command::Run(work)) => drop(streams.spawn(work)),
                None => break,
            },
            Some(_) = streams.join_next() => {}
            _ = &mut singles, if !singles.is_finished() => break,
        }
    }
    while streams.join_next().await.is_some() {}
    if !singles.is_finished() {
        drop(singles.await);
    }
    // Closed already, or it panicked: nobody is to wait for it.
    inbox.end();
    notify::flush_last(&shared).await;
}
