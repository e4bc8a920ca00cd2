//! `ProducerCore` and `EnqueuedIds`: a producer as Python sees it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::{PyException, PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::engine::connect::Target;
use crate::engine::error::{Error, Kind};
use crate::engine::produce::answer::{Answer, Mailbox, Reply, Waiter};
use crate::engine::produce::copy::Batch;
use crate::engine::produce::{BATCH_BYTES, BATCH_TASKS, Handoff, Producer, SMALL_BYTES, SMALL_TASKS, Settings, ids};
use crate::py::error::{OrRaise, to_py};
use crate::py::task_in::{self, Reader, Refused};
use crate::py::{json, mailbox};

/// How long a wait goes without a look for signals.
const SLICE: Duration = Duration::from_millis(50);

/// `fastq.settings.ProducerSettings`.
#[derive(FromPyObject)]
struct ProducerSettings {
    dsn: String,
    schema: String,
    payload_limit: usize,
    connect_timeout: f64,
    statement_timeout: f64,
    iterable_timeout: f64,
    notify: bool,
}

fn duration(name: &str, seconds: f64) -> Result<Duration, Error> {
    let wrong = || Error::settings(format!("{name} is {seconds}, but must be a positive number of seconds"));
    Duration::try_from_secs_f64(seconds).ok().filter(|d| *d > Duration::ZERO).ok_or_else(wrong)
}

impl ProducerSettings {
    fn producer(self) -> Result<Producer, Error> {
        let connect_timeout = duration("connect_timeout", self.connect_timeout)?;
        let statement_timeout = duration("statement_timeout", self.statement_timeout)?;
        let target = Target::new(&self.dsn, &self.schema, "producer", connect_timeout, statement_timeout)?;
        let settings = Settings {
            payload_limit: self.payload_limit,
            connect_timeout,
            statement_timeout,
            iterable_timeout: duration("iterable_timeout", self.iterable_timeout)?,
            notify: self.notify,
        };
        Ok(Producer::new(target, settings))
    }
}

/// A compact sequence of ids, each with whether its task is new.
#[pyclass(frozen, module = "fastq._core")]
pub(crate) struct EnqueuedIds(ids::EnqueuedIds);

impl EnqueuedIds {
    /// Wraps the engine's.
    pub(crate) fn new(ids: ids::EnqueuedIds) -> Self {
        Self(ids)
    }
}

#[pymethods]
impl EnqueuedIds {
    fn __len__(&self) -> usize {
        usize::try_from(self.0.len()).unwrap_or(usize::MAX)
    }

    fn get(&self, index: u64) -> PyResult<(i64, bool)> {
        self.0.get(index).ok_or_else(|| PyIndexError::new_err(format!("there is no task {index} in {}", self.0.len())))
    }
}

/// A producer's connections on one native thread of their own.
#[pyclass(frozen, module = "fastq._core")]
pub(crate) struct ProducerCore {
    inner: Producer,
    mailboxes: Mutex<(u64, HashMap<u64, Arc<Mailbox>>)>,
}

#[pymethods]
impl ProducerCore {
    #[new]
    fn new(py: Python<'_>, settings: ProducerSettings) -> PyResult<Self> {
        Ok(Self { inner: settings.producer().or_raise(py)?, mailboxes: Mutex::default() })
    }

    fn enqueue(&self, py: Python<'_>, task: &Bound<'_, PyAny>) -> PyResult<(i64, bool)> {
        self.inner.check().or_raise(py)?;
        let task = task_in::read(task, self.inner.settings().payload_limit).map_err(|e| raise(py, e))?;
        let waiter = Waiter::default();
        self.inner.enqueue(vec![task], Reply::to_waiter(&waiter)).or_raise(py)?;
        let answers = wait_for_answer(py, &waiter)?.or_raise(py)?;
        answers.first().copied().ok_or_else(|| PyValueError::new_err("one task, and no answer"))
    }

    #[pyo3(signature = (tasks, commit_every))]
    fn enqueue_many(
        &self,
        py: Python<'_>,
        tasks: &Bound<'_, PyAny>,
        commit_every: Option<i64>,
    ) -> PyResult<EnqueuedIds> {
        self.inner.check().or_raise(py)?;
        let commit_every = commit_every.map(check_commit_every).transpose().or_raise(py)?;
        let mut call = Call {
            py,
            producer: &self.inner,
            reader: Reader::new(self.inner.settings().payload_limit),
            batch: Box::default(),
            stream: None,
            commit_every,
            until_commit: commit_every.unwrap_or(u64::MAX),
        };
        match call.run(tasks) {
            Ok(ids) => Ok(EnqueuedIds(ids)),
            Err(stop) => Err(call.stop(stop)),
        }
    }

    fn attach_loop(&self, fd: i32) -> PyResult<u64> {
        let made = Arc::new(Mailbox::new(mailbox::waker(fd)?));
        let mut mailboxes = self.mailboxes.lock();
        mailboxes.0 += 1;
        let number = mailboxes.0;
        mailboxes.1.insert(number, made);
        Ok(number)
    }

    fn detach_loop(&self, mailbox: u64) {
        // Dropped outside of the lock: it closes a socket.
        let gone = self.mailboxes.lock().1.remove(&mailbox);
        drop(gone);
    }

    fn submit(&self, py: Python<'_>, mailbox: u64, task: &Bound<'_, PyAny>) -> PyResult<u64> {
        self.inner.check().or_raise(py)?;
        let mailbox = self.mailbox(mailbox)?;
        let task = task_in::read(task, self.inner.settings().payload_limit).map_err(|e| raise(py, e))?;
        let number = mailbox.number();
        self.inner.enqueue(vec![task], Reply::to_mailbox(&mailbox, number)).or_raise(py)?;
        Ok(number)
    }

    fn receive<'py>(&self, py: Python<'py>, mailbox: u64) -> PyResult<Bound<'py, PyList>> {
        let letters = self.mailbox(mailbox)?.take();
        let list = PyList::empty(py);
        for (number, answer) in letters {
            match answer {
                Ok(answers) => list.append((number, answers.first().copied(), py.None()))?,
                Err(e) => list.append((number, py.None(), to_py(py, &e).into_value(py)))?,
            }
        }
        Ok(list)
    }

    fn wake(&self, py: Python<'_>, lanes: Vec<i32>, witness: Option<i64>) -> PyResult<()> {
        self.inner.wake(lanes, witness).or_raise(py)
    }

    #[allow(clippy::type_complexity, reason = "the stub's own type")]
    fn watch(&self, py: Python<'_>, seconds: f64) -> (Vec<(u8, String, String)>, usize, bool) {
        // As threads wait: less than nothing is nothing.
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let outbox = self.inner.outbox();
        let (records, threads, has_ended) = py.detach(|| outbox.wait(limit));
        let record = |r: crate::engine::logs::Record| (r.level as u8, format!("fastq.{}", r.part), r.message);
        (records.into_iter().map(record).collect(), threads, has_ended)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for (name, value) in self.inner.stats().read() {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(thread) = self.inner.close() else { return Ok(()) };
        while !thread.is_finished() {
            py.detach(|| std::thread::sleep(Duration::from_millis(1)));
            py.check_signals()?;
        }
        drop(py.detach(|| thread.join()));
        Ok(())
    }
}

impl ProducerCore {
    /// The engine's producer.
    pub(crate) fn inner(&self) -> &Producer {
        &self.inner
    }

    fn mailbox(&self, number: u64) -> PyResult<Arc<Mailbox>> {
        let found = self.mailboxes.lock().1.get(&number).cloned();
        found.ok_or_else(|| PyValueError::new_err(format!("there is no mailbox {number}")))
    }
}

/// Waits, detached, for what `look` brings; signals are seen to in between.
fn wait<T: Send>(py: Python<'_>, look: impl Fn() -> Option<T> + Send + Sync) -> PyResult<T> {
    loop {
        if let Some(value) = py.detach(&look) {
            return Ok(value);
        }
        py.check_signals()?;
    }
}

fn wait_for_answer(py: Python<'_>, waiter: &Waiter) -> PyResult<Answer> {
    let answer = wait(py, || waiter.wait(SLICE))?;
    waiter.pass_on();
    Ok(answer)
}

pub(crate) fn raise(py: Python<'_>, refused: Refused) -> PyErr {
    match refused {
        Refused::Engine(e) => to_py(py, &e),
        Refused::Python(e) => e,
    }
}

fn check_commit_every(tasks: i64) -> Result<u64, Error> {
    let wrong = || Error::settings(format!("commit_every is {tasks}, but must be 1 or more tasks, or None"));
    u64::try_from(tasks).ok().filter(|&n| n > 0).ok_or_else(wrong)
}

/// Why a call ends without an answer.
enum Stop {
    /// The iterable raised.
    Raised(PyErr),
    /// A signal's handler raised, or something else that has nothing to do with fastq.
    Unrelated(PyErr),
    /// A task is refused, or the engine failed.
    Failed(Error),
}

/// One `enqueue_many`, on the caller's thread.
struct Call<'a, 'py> {
    py: Python<'py>,
    producer: &'a Producer,
    reader: Reader<'py>,
    batch: Box<Batch>,
    stream: Option<Arc<Handoff>>,
    commit_every: Option<u64>,
    until_commit: u64,
}

impl<'py> Call<'_, 'py> {
    fn run(&mut self, tasks: &Bound<'py, PyAny>) -> Result<ids::EnqueuedIds, Stop> {
        for (index, task) in (0..).zip(tasks.try_iter().map_err(Stop::Unrelated)?) {
            let task = task.map_err(Stop::Raised)?;
            if let Some(stream) = &self.stream {
                stream.touch();
                if stream.has_ended() {
                    return self.outcome();
                }
            }
            self.reader.add(&task, &mut self.batch).map_err(|refused| match refused {
                Refused::Engine(e) => Stop::Failed(e.at(index)),
                Refused::Python(e) => Stop::Unrelated(e),
            })?;
            self.until_commit -= 1;
            if self.until_commit == 0 {
                self.batch.commit = true;
                self.until_commit = self.commit_every.unwrap_or(u64::MAX);
            }
            if self.batch.commit || self.batch.len >= BATCH_TASKS || self.batch.bytes() >= BATCH_BYTES {
                self.hand_over()?;
            }
        }
        if self.stream.is_none() && self.batch.len <= SMALL_TASKS && self.batch.bytes() <= SMALL_BYTES {
            return self.send_small();
        }
        if self.batch.len > 0 {
            self.batch.commit = true;
            self.hand_over()?;
        }
        self.outcome()
    }

    fn hand_over(&mut self) -> Result<(), Stop> {
        let stream = match &self.stream {
            Some(stream) => Arc::clone(stream),
            None => Arc::clone(self.stream.insert(self.producer.stream().map_err(Stop::Failed)?)),
        };
        let mut batch = std::mem::take(&mut self.batch);
        while let Some(back) = self.py.detach(|| stream.offer(batch, SLICE)) {
            batch = back;
            self.py.check_signals().map_err(Stop::Unrelated)?;
        }
        Ok(())
    }

    /// A few tasks go as one of the flights of single enqueues, whole.
    fn send_small(&mut self) -> Result<ids::EnqueuedIds, Stop> {
        let mut ids = ids::EnqueuedIds::default();
        if self.batch.len == 0 {
            return Ok(ids);
        }
        let tasks = std::mem::take(&mut self.batch).into_tasks();
        let waiter = Waiter::default();
        self.producer.enqueue(tasks, Reply::to_waiter(&waiter)).map_err(Stop::Failed)?;
        let answers = wait_for_answer(self.py, &waiter).map_err(Stop::Unrelated)?.map_err(Stop::Failed)?;
        for (id, is_new) in answers {
            ids.push(id, is_new);
        }
        Ok(ids)
    }

    fn outcome(&mut self) -> Result<ids::EnqueuedIds, Stop> {
        let Some(stream) = &self.stream else { return Ok(ids::EnqueuedIds::default()) };
        stream.finish();
        let outcome = wait(self.py, || stream.wait(SLICE)).map_err(Stop::Unrelated)?;
        // Over: there is nothing left to abort.
        outcome.map_err(Stop::Failed)
    }

    /// Rolls back what is open and waits until it is; then the error to raise.
    fn stop(self, stop: Stop) -> PyErr {
        let py = self.py;
        let mut committed = self.commit_every.map(|_| 0);
        if let Some(stream) = &self.stream {
            stream.abort(self.commit_every.is_some());
            while !stream.has_ended() {
                py.detach(|| drop(stream.wait(SLICE)));
                if let Err(e) = py.check_signals() {
                    return e;
                }
            }
            committed = self.commit_every.map(|_| stream.committed());
        }
        let rest = match committed {
            Some(n) => format!("{n} tasks of the call are in and stay"),
            None => "it was rolled back, and nothing of the call is written".to_owned(),
        };
        match (stop, committed) {
            (Stop::Raised(e), _) if e.is_instance_of::<PyException>(py) => {
                // What fastq's own feeds raise says it all already, but for what is in.
                if is_enqueue_error(py, &e).unwrap_or(false) {
                    return e.value(py).setattr("committed", committed).map_or_else(|failed| failed, |()| e);
                }
                let name = e.get_type(py).name().map_or_else(|_| "an exception".to_owned(), |name| name.to_string());
                let message = format!("the iterable raised {name}: {rest}");
                let error = to_py(py, &Error { committed, ..Error::new(Kind::Enqueue, message) });
                error.set_cause(py, Some(e));
                error
            }
            (Stop::Raised(e) | Stop::Unrelated(e), _) => e,
            (Stop::Failed(e), None) if !was_sent(&e.kind) => to_py(py, &Error { committed, ..e }),
            (Stop::Failed(e), _) => {
                let message = format!("{}; {rest}", e.message);
                to_py(py, &Error { message, committed, ..e })
            }
        }
    }
}

/// Whether the message must say what became of the transaction: it was open, and what became of it is known.
fn was_sent(kind: &Kind) -> bool {
    matches!(kind, Kind::Database { .. } | Kind::ConnectionLost { in_doubt: false } | Kind::Duplicate { .. })
}

fn is_enqueue_error(py: Python<'_>, e: &PyErr) -> PyResult<bool> {
    Ok(e.matches(py, py.import("fastq.errors")?.getattr("EnqueueError")?)?)
}

/// `value` as compact JSON in UTF-8.
#[pyfunction]
pub(crate) fn encode_json<'py>(py: Python<'py>, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let mut out = Vec::with_capacity(128);
    json::encode(value, &mut out, usize::MAX).or_raise(py)?;
    Ok(PyBytes::new(py, &out))
}
