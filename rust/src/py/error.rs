//! Engine errors become the classes of `fastq.errors`, which Python owns: one conversion.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::engine::error::{Error, Kind};

/// The Python exception for `error`.
pub(crate) fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|e| e)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let errors = py.import(intern!(py, "fastq.errors"))?;
    let kwargs = PyDict::new(py);
    let class = match &error.kind {
        Kind::Settings => "SettingsError",
        Kind::Schema => "SchemaError",
        Kind::Database { sqlstate, transient } => {
            if !sqlstate.is_empty() {
                kwargs.set_item("sqlstate", sqlstate)?;
            }
            kwargs.set_item("is_transient", transient)?;
            "DatabaseError"
        }
        Kind::ConnectionLost { in_doubt } => {
            kwargs.set_item("in_doubt", in_doubt)?;
            "ConnectionLost"
        }
        Kind::Enqueue => "EnqueueError",
        Kind::Payload => "PayloadError",
        Kind::Duplicate { existing } => {
            kwargs.set_item("existing_id", existing)?;
            "DuplicateTask"
        }
        Kind::Consumer => "ConsumerError",
    };
    let mut message = error.message.clone();
    if matches!(error.kind, Kind::Enqueue | Kind::Payload | Kind::Duplicate { .. }) {
        kwargs.set_item("index", error.index)?;
        kwargs.set_item("committed", error.committed)?;
    } else if let Some(index) = error.index {
        message = format!("task {index}: {message}");
    }
    let exception = errors.getattr(class)?.call((PyString::new(py, &message),), Some(&kwargs))?;
    Ok(PyErr::from_value(exception))
}

/// `?` for engine results at the border.
pub(crate) trait OrRaise<T> {
    /// The value, or the Python exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for Result<T, Error> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|e| to_py(py, &e))
    }
}
