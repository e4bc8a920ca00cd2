//! `TaskInfo`: a claimed task as its handler sees it.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTzInfo};

use crate::engine::consume::Shared;
use crate::engine::consume::task::Task;
use crate::engine::logs::Level;
use crate::py::run_options;

/// A claimed task, as its handler sees it.
#[pyclass(frozen, module = "fastq", name = "TaskInfo")]
pub(crate) struct TaskInfo {
    pub(crate) task: Task,
    /// The run's number on an event loop; 0 on a thread.
    pub(crate) run: u64,
    pub(crate) shared: Arc<Shared>,
    /// Decoded at the first look. Not in `PyOnceLock`, which lets other threads run for a moment: one more handler was begun.
    payload: OnceLock<Py<PyAny>>,
}

impl TaskInfo {
    pub(crate) fn new(task: Task, run: u64, shared: &Arc<Shared>) -> Self {
        Self { task, run, shared: Arc::clone(shared), payload: OnceLock::new() }
    }
}

thread_local! {
    /// Whose handler runs on this thread. No context variable: to set one for each task cost a fifth of the rate.
    static RUNNING: RefCell<Option<Py<TaskInfo>>> = const { RefCell::new(None) };
}

/// Calls `f` as this task's handler. What it leaves behind, however it ends: no task runs here.
pub(crate) fn run_as<T>(info: Py<TaskInfo>, f: impl FnOnce() -> T) -> T {
    struct Clear;
    impl Drop for Clear {
        fn drop(&mut self) {
            RUNNING.take();
        }
    }
    RUNNING.set(Some(info));
    let _clear = Clear;
    f()
}

/// The task whose sync handler runs on the calling thread.
#[pyfunction]
pub(crate) fn running_task(py: Python<'_>) -> Option<Py<TaskInfo>> {
    RUNNING.with_borrow(|running| running.as_ref().map(|info| info.clone_ref(py)))
}

/// The class `fastq.TaskCancelled`.
fn task_cancelled(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.import(pyo3::intern!(py, "fastq.control"))?.getattr(pyo3::intern!(py, "TaskCancelled"))
}

impl TaskInfo {
    /// Whether what the handler raised is nobody's affair, since its run counted no longer: its task was cancelled, or its time was up.
    /// Where only the registration is gone what it raises may still be stored, unless it gave up for just that.
    pub(crate) fn dismisses(&self, error: &Bound<'_, PyAny>) -> bool {
        let gave_up = || task_cancelled(error.py()).and_then(|class| error.is_instance(&class)).unwrap_or(false);
        let is_dismissed = self.task.is_lost() || (self.is_cancelled() && gave_up());
        if is_dismissed {
            let (id, name) = (self.id(), self.r#type());
            let class = error.get_type().name().map_or_else(|_| "an exception".to_owned(), |name| name.to_string());
            let message = format!("task {id} ({name}) counted no longer when its handler ended with {class}");
            self.shared.outbox.log(Level::Debug, "handler", message);
        }
        is_dismissed
    }
}

#[pymethods]
impl TaskInfo {
    #[getter]
    fn id(&self) -> i64 {
        self.task.id()
    }

    #[getter]
    fn r#type(&self) -> &str {
        &self.task.chunk.name
    }

    #[getter]
    fn queue(&self) -> &str {
        &self.task.chunk.queue
    }

    #[getter]
    fn payload<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(known) = self.payload.get() {
            return Ok(known.bind(py).clone());
        }
        let bytes = self.task.payload();
        let value = if self.task.is_json() {
            let parse = jiter::PythonParse {
                allow_inf_nan: false,
                cache_mode: jiter::StringCacheMode::Keys,
                ..Default::default()
            };
            parse.python_parse(py, bytes).map_err(|e| jiter::map_json_error(bytes, &e))?
        } else {
            PyBytes::new(py, bytes).into_any()
        };
        // Of two threads that looked at once, the first has decoded what both get.
        Ok(self.payload.get_or_init(|| value.unbind()).bind(py).clone())
    }

    /// The payload as an instance of a model's class.
    fn payload_as<'py>(slf: &Bound<'py, Self>, model: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("fastq._models")?.getattr("payload_as")?.call1((slf, model))
    }

    #[getter]
    fn raw_payload<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.task.payload())
    }

    #[getter]
    fn attempt(&self) -> i16 {
        self.task.chunk.attempts + 1
    }

    #[getter]
    fn max_attempts(&self) -> i16 {
        self.task.chunk.max_attempts
    }

    #[getter]
    fn timeout(&self) -> Option<f64> {
        self.task.options().timeout
    }

    #[getter]
    fn retry<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.task.options().retry.map(|retry| run_options::policy(py, retry)).transpose()
    }

    #[getter]
    fn created_at<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let datetime = py.import("datetime")?;
        let utc = PyTzInfo::utc(py)?;
        let epoch = datetime.getattr("datetime")?.call1((2000, 1, 1, 0, 0, 0, 0, utc))?;
        let since = datetime.getattr("timedelta")?.call1((0, 0, self.task.created_at()))?;
        epoch.add(since)
    }

    fn is_cancelled(&self) -> bool {
        self.shared.is_lost(&self.task)
    }

    fn raise_if_cancelled(&self, py: Python<'_>) -> PyResult<()> {
        if !self.is_cancelled() {
            return Ok(());
        }
        let message = format!("task {} was cancelled, or its run lost its claim or ran out of time", self.id());
        Err(PyErr::from_value(task_cancelled(py)?.call1((message,))?))
    }

    /// Completes the task in a transaction on the handler's own connection.
    fn complete_tx<'py>(slf: &Bound<'py, Self>, conn: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("fastq._tx.completing")?.getattr("complete")?.call1((slf, conn))
    }

    /// The same on an async connection; gives a coroutine.
    fn acomplete_tx<'py>(slf: &Bound<'py, Self>, conn: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("fastq._tx.completing")?.getattr("acomplete")?.call1((slf, conn))
    }

    #[getter]
    fn handler(&self) -> usize {
        self.task.chunk.kind
    }

    fn __repr__<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        let text = format!(
            "<TaskInfo {} {:?} attempt {} of {}>",
            self.id(),
            self.r#type(),
            self.attempt(),
            self.max_attempts()
        );
        PyString::new(py, &text)
    }
}
