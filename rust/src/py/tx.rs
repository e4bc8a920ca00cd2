//! `TxTasks`: tasks on their way into a transaction on the user's own connection.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::engine::error::{Error, Result};
use crate::engine::produce::copy::Batch;
use crate::engine::produce::texts::{self, Params};
use crate::engine::produce::{NOTIFY_LANES, Producer, lend, tx};
use crate::engine::sql;
use crate::py::error::OrRaise;
use crate::py::producer::{EnqueuedIds, ProducerCore, raise};
use crate::py::task_in::{Reader, Refused};

/// How long a wait goes without a look for signals.
const SLICE: Duration = Duration::from_millis(50);

/// Tasks that were read and checked; the statements that write them.
#[pyclass(frozen, module = "fastq._core")]
pub(crate) struct TxTasks {
    core: Py<ProducerCore>,
    tasks: Mutex<tx::TxTasks>,
    /// One of a call of many: errors name its place.
    is_many: bool,
}

/// One COPY's bytes in blocks, and the parameters of the statements that follow it.
type Large<'py> = (Vec<Bound<'py, PyBytes>>, Vec<Params>);

#[pymethods]
impl TxTasks {
    /// Reads, checks and encodes all of them before anything is sent.
    #[new]
    fn new(py: Python<'_>, core: Py<ProducerCore>, tasks: &Bound<'_, PyAny>) -> PyResult<Self> {
        let producer = core.get().inner();
        producer.check().or_raise(py)?;
        let mut reader = Reader::new(producer.settings().payload_limit);
        let mut batch = Batch::default();
        for (index, task) in (0..).zip(tasks.try_iter()?) {
            reader.add(&task?, &mut batch).map_err(|refused| match refused {
                Refused::Engine(e) => raise(py, Refused::Engine(e.at(index))),
                python @ Refused::Python(_) => raise(py, python),
            })?;
            tx::check_size(&batch).or_raise(py)?;
        }
        Ok(Self { tasks: Mutex::new(tx::TxTasks::new(batch).or_raise(py)?), core, is_many: true })
    }

    /// The same for one task, whose errors name no place.
    #[staticmethod]
    fn one(py: Python<'_>, core: Py<ProducerCore>, task: &Bound<'_, PyAny>) -> PyResult<Self> {
        let producer = core.get().inner();
        producer.check().or_raise(py)?;
        let mut batch = Batch::default();
        let mut reader = Reader::new(producer.settings().payload_limit);
        reader.add(task, &mut batch).map_err(|refused| raise(py, refused))?;
        Ok(Self { tasks: Mutex::new(tx::TxTasks::new(batch).or_raise(py)?), core, is_many: false })
    }

    fn number(&self, py: Python<'_>) -> PyResult<()> {
        let (keys, n) = {
            let tasks = self.tasks.lock();
            (tasks.keys(), tasks.needs())
        };
        let supplied = wait(py, self.producer().supply(keys, n).or_raise(py)?)?.or_raise(py)?;
        self.tasks.lock().number(supplied);
        Ok(())
    }

    fn forget_ids(&self) {
        self.producer().forget_ids();
    }

    fn home(&self, py: Python<'_>) -> PyResult<String> {
        wait(py, self.producer().home().or_raise(py)?)?.or_raise(py)
    }

    fn notification(&self) -> Vec<Params> {
        let channel = sql::channel(self.producer().schema());
        let text = |lanes: &[i32]| lanes.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
        let array = |text: &str| texts::bytes(std::iter::once(text.as_bytes()));
        let (lanes, _) = self.tasks.lock().news();
        lanes.chunks(NOTIFY_LANES).map(|some| vec![array(&channel), array(&text(some))]).collect()
    }

    fn __len__(&self) -> usize {
        self.tasks.lock().len()
    }

    #[getter]
    fn is_small(&self) -> bool {
        self.tasks.lock().is_small()
    }

    #[getter]
    fn has_open_tokens(&self) -> bool {
        self.tasks.lock().has_open_tokens()
    }

    #[getter]
    fn leaf(&self) -> i16 {
        self.tasks.lock().leaf()
    }

    fn find(&self) -> Vec<(usize, Params)> {
        self.tasks.lock().find()
    }

    #[allow(clippy::needless_pass_by_value, reason = "Python's lists become vectors")]
    fn found(&self, py: Python<'_>, number: usize, places: Vec<i64>, ids: Vec<i64>, may_go: Vec<i64>) -> PyResult<()> {
        let found = self.tasks.lock().found(number, &places, &ids, &may_go);
        if found.is_err() {
            self.forget_ids();
        }
        found.or_raise(py)
    }

    fn write_small(&self, is_first: bool) -> Params {
        self.tasks.lock().write_small(is_first)
    }

    fn take(&self) -> Vec<(&'static str, Params)> {
        self.tasks.lock().take()
    }

    fn take_over(&self) -> Vec<(usize, Params, Params)> {
        self.tasks.lock().take_over()
    }

    fn took_over(&self, py: Python<'_>, number: usize, places: Vec<i64>, ids: Vec<i64>) -> PyResult<()> {
        self.tasks.lock().took_over(number, places, ids).or_raise(py)
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let place = |e: Error| if self.is_many { e } else { Error { index: None, ..e } };
        self.tasks.lock().check().map_err(place).or_raise(py)
    }

    fn swaps(&self, py: Python<'_>) -> Vec<(&'static str, Params)> {
        py.detach(|| self.tasks.lock().swaps())
    }

    #[allow(clippy::needless_pass_by_value, reason = "Python's list becomes a vector")]
    fn took(&self, ids: Vec<i64>) {
        self.tasks.lock().took(&ids);
    }

    fn write_large<'py>(&self, py: Python<'py>) -> Large<'py> {
        let (blocks, statements) = py.detach(|| self.tasks.lock().write_large());
        (blocks.iter().map(|block| PyBytes::new(py, block)).collect(), statements)
    }

    fn news(&self) -> (Vec<i32>, Option<i64>) {
        self.tasks.lock().news()
    }

    fn answer(&self) -> EnqueuedIds {
        EnqueuedIds::new(self.tasks.lock().answer())
    }
}

impl TxTasks {
    fn producer(&self) -> &Producer {
        self.core.get().inner()
    }
}

/// Waits, detached, for the I/O thread's answer; signals are seen to in between.
#[allow(clippy::needless_pass_by_value, reason = "it is used up")]
fn wait<T: Send>(py: Python<'_>, answer: Receiver<Result<T>>) -> PyResult<Result<T>> {
    let answer = Arc::new(Mutex::new(answer));
    loop {
        match py.detach(|| answer.lock().recv_timeout(SLICE)) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(Err(lend::unanswered())),
        }
    }
}
