//! Tasks with no engine behind them, for unit tests of handlers: `fastq.testing`.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::engine::consume::task::{Chunk, Task};
use crate::engine::consume::{Phase, Shared};
use crate::py::task::TaskInfo;

/// A task as a claim would bring it: its id, its type, and so on. `created_at`: microseconds since 2000-01-01 UTC.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "what a task has, named at the only caller")]
pub(crate) fn make_task(
    number: i64,
    name: &str,
    queue: &str,
    payload: &[u8],
    is_json: bool,
    attempt: i16,
    max_attempts: i16,
    created_at: i64,
) -> TaskInfo {
    let mut chunk = Chunk::new(0, 0, 0, queue.into(), 0, attempt - 1, max_attempts);
    chunk.name = name.into();
    chunk.push(number, created_at, if is_json { b'j' } else { b'b' }, payload);
    TaskInfo::new(Task { chunk: Arc::new(chunk), at: 0 }, 0, &Arc::new(Shared::detached()))
}

/// From here on `is_cancelled()` of a task that `make_task` made.
#[pyfunction]
pub(crate) fn cancel_made(task: &TaskInfo) -> PyResult<()> {
    // An engine that hands out tasks runs.
    if task.shared.phase() != Phase::New {
        return Err(PyTypeError::new_err(
            "this task is a worker's own: only those of task_context() can be cancelled so, others by Client.cancel_task()",
        ));
    }
    task.task.lose();
    Ok(())
}
