//! `Engine`: a consumer's engine as Python sees it, and the life of a handler thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::engine::consume::moment::Moment;
use crate::engine::consume::retain::{Kept, Retentions, Rule};
use crate::engine::consume::sched::{Kind, Message, Next, Take};
use crate::engine::consume::task::{Failure, Outcome, Task};
use crate::engine::consume::{self, Phase, Settings, Shared};
use crate::engine::error::{Error, Kind as ErrorKind};
use crate::engine::process;
use crate::py::complete::had_completed;
use crate::py::error::OrRaise;
use crate::py::mailbox;
use crate::py::result;
use crate::py::task::{TaskInfo, run_as};

/// A thread hands its outcomes over after this long, even within a batch; while it is within a handler, the engine's watch does.
const HAND_OVER: Duration = Duration::from_millis(1);
/// Seconds until a task runs again whose handler could not even be called (no memory).
const UNCALLED_S: f64 = 60.0;
/// Of an attempt whose handler returned: see `rolled_back`.
const ROLLED_BACK: &str = "the transaction that was to complete it (complete_tx) was rolled back, or its connection was lost, and the \
     handler returned all the same";
/// A thread that found nothing for this long leaves.
const IDLE: Duration = Duration::from_secs(30);

#[derive(FromPyObject)]
struct TypeSettings {
    r#type: String,
    is_async: bool,
    workers: Option<usize>,
    timeout: Option<f64>,
    result_ttl: Option<f64>,
}

#[derive(FromPyObject)]
struct ConsumerSettings {
    dsn: String,
    schema: String,
    types: Vec<TypeSettings>,
    queues: Option<Vec<String>>,
    concurrency: usize,
    prefetch: usize,
    prefetch_bytes: usize,
    heartbeat_interval: f64,
    dead_after: f64,
    lease: f64,
    poll_interval: f64,
    connect_timeout: f64,
    statement_timeout: f64,
    listen: bool,
    completed_retention: f64,
    failed_retention: f64,
    cancelled_retention: f64,
    expired_retention: f64,
    archive: [bool; 4],
    queue_retention: Vec<(String, [f64; 4], [bool; 4])>,
    upkeep: bool,
    result_limit: usize,
    ageing: usize,
}

impl ConsumerSettings {
    fn into_settings(self) -> Result<Settings, Error> {
        let time = |name: &str, value: f64| {
            Duration::try_from_secs_f64(value)
                .ok()
                .filter(|d| *d > Duration::ZERO)
                .ok_or_else(|| Error::settings(format!("{name} is {value}; it must be a positive number of seconds")))
        };
        let kept = |whose: &str, times: [f64; 4], archived: [bool; 4]| -> Result<Kept, Error> {
            let rule = |at: usize| {
                let time = Duration::try_from_secs_f64(times[at])
                    .map_err(|e| Error::settings(format!("the retention of {whose} is {} s: {e}", times[at])))?;
                Ok::<_, Error>(Rule { time, is_archived: archived[at] })
            };
            Ok(Kept { completed: rule(0)?, failed: rule(1)?, cancelled: rule(2)?, expired: rule(3)? })
        };
        let of_queue = |(queue, times, archived): (String, [f64; 4], [bool; 4])| {
            let rules = kept(&format!("queue {queue:?}"), times, archived)?;
            Ok((queue, rules))
        };
        let times = [self.completed_retention, self.failed_retention, self.cancelled_retention, self.expired_retention];
        let concurrency = self.concurrency;
        let kind = |t: TypeSettings| {
            let timeout = t.timeout.map(|s| time("timeout", s)).transpose()?;
            let result_ttl = t.result_ttl.map(|s| time("result_ttl", s)).transpose()?;
            Ok(Kind {
                name: t.r#type,
                is_async: t.is_async,
                workers: t.workers.unwrap_or(concurrency).min(concurrency),
                timeout,
                result_ttl,
            })
        };
        Ok(Settings {
            kinds: self.types.into_iter().map(kind).collect::<Result<_, Error>>()?,
            queues: self.queues,
            concurrency,
            prefetch: self.prefetch,
            prefetch_bytes: self.prefetch_bytes,
            heartbeat_interval: time("heartbeat_interval", self.heartbeat_interval)?,
            dead_after: time("dead_after", self.dead_after)?,
            lease: time("lease", self.lease)?,
            poll_interval: time("poll_interval", self.poll_interval)?,
            connect_timeout: time("connect_timeout", self.connect_timeout)?,
            statement_timeout: time("statement_timeout", self.statement_timeout)?,
            listen: self.listen,
            retention: Retentions {
                rest: kept("all queues", times, self.archive)?,
                queues: self.queue_retention.into_iter().map(of_queue).collect::<Result<_, Error>>()?,
            },
            upkeep: self.upkeep,
            result_limit: self.result_limit,
            ageing: self.ageing,
            dsn: self.dsn,
            schema: self.schema,
        })
    }
}

/// A consumer's claimer, completer, heartbeat and upkeep on one native thread that never waits for Python.
#[pyclass(frozen, module = "fastq._core")]
pub(crate) struct Engine {
    settings: Settings,
    handlers: Vec<Option<Py<PyAny>>>,
    on_error: Py<PyAny>,
    copy_context: Py<PyAny>,
    shared: Mutex<Option<Arc<Shared>>>,
    pid: u32,
}

impl Engine {
    /// The running engine; a forked child has none.
    fn shared(&self, py: Python<'_>) -> PyResult<Arc<Shared>> {
        self.check_pid().or_raise(py)?;
        let shared = self.shared.lock().clone();
        shared.ok_or_else(|| Error::new(ErrorKind::Consumer, "the consumer is not started")).or_raise(py)
    }

    fn check_pid(&self) -> Result<(), Error> {
        if self.pid == process::id() {
            return Ok(());
        }
        let message = "this consumer was started before a fork and is used in the child, where its threads do not exist: \
             start it after the fork, or start processes by spawn or forkserver";
        Err(Error::new(ErrorKind::Consumer, message))
    }

    /// Calls a sync handler in a fresh context. Whatever goes wrong becomes an outcome: a thread that left early would keep its slot.
    fn call(&self, py: Python<'_>, handler: &Py<PyAny>, task: Task, shared: &Arc<Shared>) -> Outcome {
        let kind = task.chunk.kind;
        let called = Py::new(py, TaskInfo::new(task, 0, shared)).and_then(|info| {
            let context = self.copy_context.call0(py)?;
            Ok(run_as(info.clone_ref(py), || {
                let returned = context.call_method1(py, pyo3::intern!(py, "run"), (handler, &info)).and_then(|value| {
                    // A sync function around a coroutine function: nothing has run.
                    if value.is_none(py) || !value.bind(py).hasattr(pyo3::intern!(py, "__await__"))? {
                        return result::completed(value.bind(py), kind, &shared.settings);
                    }
                    value.bind(py).call_method0(pyo3::intern!(py, "close")).ok();
                    let wrong = "the handler returned an awaitable, which nobody awaits: make it `async def`";
                    Err(PyTypeError::new_err(wrong))
                });
                returned.map_err(|e| {
                    if info.get().dismisses(e.value(py)) {
                        Outcome::Dropped
                    } else if had_completed(py, &info, e.value(py)) {
                        Outcome::Completed
                    } else {
                        self.judge(py, &info, e)
                    }
                })
            }))
        });
        match called {
            Ok(Ok(outcome) | Err(outcome)) => outcome,
            Err(e) => failed(Some(UNCALLED_S), format!("the handler could not be called: {e}")),
        }
    }

    /// What Python's rules make of an exception.
    fn judge(&self, py: Python<'_>, info: &Py<TaskInfo>, error: PyErr) -> Outcome {
        let judged = self.on_error.call1(py, (info, error.into_value(py))).and_then(|r| r.extract::<Verdict>(py));
        match judged {
            Ok(verdict) => outcome(verdict),
            Err(e) => failed(None, format!("the error handler failed: {e}")),
        }
    }
}

/// The error of an attempt whose handler returned although its transaction was rolled back.
fn rolled_back(py: Python<'_>) -> PyErr {
    let class = py.import("fastq.errors").and_then(|errors| errors.getattr("CompletionError"));
    class.and_then(|class| class.call1((ROLLED_BACK,))).map_or_else(|e| e, PyErr::from_value)
}

/// Of an attempt that raised: whether it is no attempt but a snooze, seconds until the next one, the error's text and traceback.
type Verdict = (bool, Option<f64>, String, String);

fn outcome((is_snooze, delay, error, traceback): Verdict) -> Outcome {
    match delay {
        Some(seconds) if is_snooze => Outcome::Snoozed(seconds),
        _ => Outcome::Failed(Box::new(Failure { delay, error: clean(error), traceback: clean(traceback) })),
    }
}

/// A failure that Python's rules could not be asked about.
fn failed(delay: Option<f64>, error: String) -> Outcome {
    outcome((false, delay, error, String::new()))
}

/// PostgreSQL's text holds no NUL.
fn clean(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

#[pymethods]
impl Engine {
    #[new]
    fn new(
        py: Python<'_>,
        settings: &Bound<'_, PyAny>,
        handlers: Vec<Option<Py<PyAny>>>,
        on_error: Py<PyAny>,
    ) -> PyResult<Self> {
        let settings = settings.extract::<ConsumerSettings>()?.into_settings().or_raise(py)?;
        let copy_context = py.import("contextvars")?.getattr("copy_context")?.unbind();
        let (shared, pid) = (Mutex::new(None), process::id());
        Ok(Self { settings, handlers, on_error, copy_context, shared, pid })
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        self.check_pid().or_raise(py)?;
        if self.shared.lock().is_some() {
            return Err(Error::new(ErrorKind::Consumer, "the consumer was started before")).or_raise(py);
        }
        let settings = self.settings.clone();
        let shared = py.detach(|| consume::start(settings)).or_raise(py)?;
        *self.shared.lock() = Some(shared);
        Ok(())
    }

    /// A handler thread's life. It stays attached while there is work, and detaches only to wait.
    fn work(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let this = slf.get();
        let shared = this.shared(py)?;
        let slot = shared.join_thread();
        let mut last = None;
        let mut began = Moment::now();
        loop {
            let take = match shared.take(&slot, last.take(), began) {
                Take::Empty => py.detach(|| shared.wait_for_work(&slot, IDLE)),
                take => take,
            };
            let kind = match take {
                Take::Batch(kind) => kind,
                Take::Empty => continue,
                Take::Leave => break,
            };
            let Some(handler) = this.handlers[kind].as_ref() else { break };
            began = Moment::now();
            let (batch_began, mut handed_over, mut count) = (began, began, 0_u32);
            loop {
                // Each start asks: away for the dead time, and others may have what is here.
                let task = match slot.begin(began, || shared.may_start(began)) {
                    Next::Run(task) => task,
                    Next::Late(tasks) => {
                        shared.give_back(tasks);
                        break;
                    }
                    Next::Done => break,
                };
                count += 1;
                shared.counters.started(1);
                let outcome = this.call(py, handler, task, &shared);
                if this.check_pid().is_err() {
                    // The handler forked, and this is the child: its tasks and results are the parent's.
                    return Ok(());
                }
                let now = Moment::now();
                slot.finish(now, outcome);
                began = now;
                if now.since(handed_over) > HAND_OVER {
                    handed_over = now;
                    slot.hand_over(&shared.outcomes);
                }
            }
            slot.hand_over(&shared.outcomes);
            last = Some((kind, count, began.since(batch_began)));
        }
        shared.leave_thread(&slot);
        Ok(())
    }

    fn watch<'py>(slf: &Bound<'py, Self>, seconds: f64) -> PyResult<(Bound<'py, PyList>, usize, bool)> {
        let py = slf.py();
        let this = slf.get();
        let shared = this.shared(py)?;
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1));
        let (records, threads, ended) = py.detach(|| shared.outbox.wait(limit));
        for expired in shared.take_expired() {
            let message = format!("the attempt took longer than its timeout of {} s", expired.timeout.as_secs_f64());
            let outcome = match Py::new(py, TaskInfo::new(expired.task.clone(), 0, &shared)) {
                Ok(info) => this.judge(py, &info, pyo3::exceptions::PyTimeoutError::new_err(message)),
                Err(_) => failed(Some(UNCALLED_S), message),
            };
            shared.end_expired(&expired, outcome);
        }
        for undone in shared.tx.take_undone() {
            let outcome = match Py::new(py, TaskInfo::new(undone.task.clone(), 0, &shared)) {
                Ok(info) => this.judge(py, &info, rolled_back(py)),
                Err(_) => failed(Some(UNCALLED_S), ROLLED_BACK.to_owned()),
            };
            shared.end_undone(&undone, outcome);
        }
        let records = records.into_iter().map(|r| (r.level as i32, format!("fastq.{}", r.part), r.message));
        Ok((PyList::new(py, records.collect::<Vec<_>>())?, threads, ended))
    }

    fn attach_loop(&self, py: Python<'_>, fd: i32) -> PyResult<()> {
        let shared = self.shared(py)?;
        shared.set_waker(mailbox::waker(fd)?);
        Ok(())
    }

    fn receive<'py>(&self, py: Python<'py>, limit: usize) -> PyResult<Bound<'py, PyList>> {
        let shared = self.shared(py)?;
        let messages = shared.receive(limit).into_iter().map(|message| {
            let (what, run, task) = match message {
                Message::Start(run, task) => (0, run, task),
                Message::Cancel(run, task) => (1, run, task),
                Message::Interrupt(run, task) => (2, run, task),
            };
            Ok((what, run, Py::new(py, TaskInfo::new(task, run, &shared))?))
        });
        PyList::new(py, messages.collect::<PyResult<Vec<_>>>()?)
    }

    /// Without a look at the process: what was fetched in a parent is begun by no child.
    #[allow(clippy::unused_self, reason = "a method of the engine, beside `complete` and `fail`")]
    fn begin(&self, task: &TaskInfo) -> Option<usize> {
        task.shared.begin_run(task.run).then_some(task.task.chunk.kind)
    }

    fn complete(&self, task: &Bound<'_, TaskInfo>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let (py, info) = (task.py(), task.get());
        let shared = self.shared(py)?;
        let outcome = result::completed(value, info.task.chunk.kind, &shared.settings)
            .unwrap_or_else(|e| self.judge(py, task.as_unbound(), e));
        shared.finish_run(info.run, &info.task, outcome);
        Ok(())
    }

    fn fail(&self, py: Python<'_>, task: &TaskInfo, verdict: Verdict) -> PyResult<()> {
        self.shared(py)?.finish_run(task.run, &task.task, outcome(verdict));
        Ok(())
    }

    fn dismiss(&self, py: Python<'_>, task: &TaskInfo, error: &Bound<'_, PyAny>) -> PyResult<bool> {
        let is_dismissed = task.dismisses(error);
        if is_dismissed {
            self.shared(py)?.finish_run(task.run, &task.task, Outcome::Dropped);
        }
        Ok(is_dismissed)
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.shared(py)?.stop();
        Ok(())
    }

    #[pyo3(signature = (seconds = 1.0))]
    fn abandon(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        let limit = Duration::try_from_secs_f64(seconds).map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        self.shared(py)?.abandon(limit);
        Ok(())
    }

    fn join(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let shared = self.shared(py)?;
        let limit = Duration::try_from_secs_f64(seconds).map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        let until = Instant::now() + limit;
        loop {
            let slice = until.saturating_duration_since(Instant::now()).min(Duration::from_millis(50));
            if py.detach(|| shared.join(slice)) {
                return Ok(true);
            }
            if slice.is_zero() {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        let shared = self.shared(py)?;
        for (name, count) in shared.counters.all() {
            stats.set_item(name, count)?;
        }
        stats.set_item("stuck", shared.stuck())?;
        Ok(stats)
    }

    #[getter]
    fn failure(&self, py: Python<'_>) -> PyResult<Option<String>> {
        Ok(self.shared(py)?.failure())
    }

    #[getter]
    fn stuck(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared(py)?.stuck())
    }

    #[getter]
    fn running(&self, py: Python<'_>) -> PyResult<usize> {
        let shared = self.shared(py)?;
        Ok(if shared.phase() == Phase::Ended { 0 } else { shared.running() })
    }
}
