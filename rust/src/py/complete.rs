//! `TxCompletion`: a task on its way to be completed in its handler's own transaction.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::tx::Answer;
use crate::engine::consume::{Phase, micros};
use crate::engine::error::Error;
use crate::engine::process;
use crate::py::error::OrRaise;
use crate::py::task::TaskInfo;

/// How long a wait goes without a look for signals.
const SLICE: Duration = Duration::from_millis(50);

/// See the module. What it finds it says in a word, for Python to say more.
#[pyclass(frozen, module = "fastq._core")]
pub(crate) struct TxCompletion {
    info: Py<TaskInfo>,
}

#[pymethods]
impl TxCompletion {
    #[new]
    fn new(task: Py<TaskInfo>) -> Self {
        Self { info: task }
    }

    /// The schema that its consumer works in.
    #[getter]
    fn schema(&self) -> &str {
        &self.info.get().shared.settings.schema
    }

    /// Whether what its handler returns is kept.
    #[getter]
    fn keeps_result(&self) -> bool {
        let info = self.info.get();
        info.shared.settings.kinds.get(info.task.chunk.kind).is_some_and(|kind| kind.result_ttl.is_some())
    }

    fn part(&self, py: Python<'_>) -> PyResult<&'static str> {
        let info = self.info.get();
        if info.shared.pid != process::id() {
            return Ok("forked");
        }
        if info.shared.phase() == Phase::New {
            return Ok("made");
        }
        if info.shared.started(&info.task.holder()).is_none() {
            return Ok("ended");
        }
        let Some(answer) = info.shared.tx.ask(info.task.clone()) else { return Ok("stopped") };
        let limit = info.shared.settings.connect_timeout + info.shared.settings.statement_timeout;
        let until = Instant::now() + limit;
        let answer = Arc::new(Mutex::new(answer));
        loop {
            match py.detach(|| answer.lock().recv_timeout(SLICE)) {
                Ok(answered) => {
                    return Ok(match answered.or_raise(py)? {
                        Answer::Held => "held",
                        Answer::Open => "open",
                        Answer::Done => "done",
                        Answer::Lost => "lost",
                        Answer::Ended => "ended",
                    });
                }
                Err(RecvTimeoutError::Disconnected) => return Ok("stopped"),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= until => {
                    let message =
                        format!("the consumer's own connection gave no answer within {} s", limit.as_secs_f64());
                    return Err(Error::lost(message)).or_raise(py);
                }
                Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            }
        }
    }

    /// Which server and database its consumer works in, once it is held.
    #[getter]
    fn home(&self) -> Option<(i64, i64)> {
        let info = self.info.get();
        info.shared.tx.get(&info.task.holder()).map(|part| part.home.into())
    }

    fn write(&self) -> Option<(i64, String)> {
        let info = self.info.get();
        let holder = info.task.holder();
        let started = info.shared.started(&holder)?;
        let part = info.shared.tx.send(&holder)?;
        let took_us = micros(Moment::now().since(started));
        Some((part.no, format!("{{{},{},{took_us}}}", part.consumer, part.no)))
    }

    fn wrote(&self) {
        let info = self.info.get();
        info.shared.tx.wrote(&info.task.holder());
    }

    /// Whether its handler's transaction decides what becomes of it.
    #[getter]
    fn is_sent(&self) -> bool {
        is_sent(self.info.get())
    }
}

/// Whether the transaction of this task's handler decides what becomes of it; nearly always a look at one number.
pub(crate) fn is_sent(info: &TaskInfo) -> bool {
    info.shared.tx.is_sent(&info.task.holder())
}

/// Whether a task whose handler raised had been completed by its transaction before. Then that has been logged.
pub(crate) fn had_completed(py: Python<'_>, info: &Py<TaskInfo>, error: &Bound<'_, PyAny>) -> bool {
    if !is_sent(info.get()) {
        return false;
    }
    let asked = py.import("fastq._tx.completing").and_then(|m| m.call_method1("had_completed", (info, error)));
    asked.and_then(|had| had.extract()).unwrap_or(false)
}
