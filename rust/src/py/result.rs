//! What a handler returned, on its way to those who wait for it.

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView};

use crate::engine::consume::Settings;
use crate::engine::consume::task::{Outcome, Returned};
use crate::py::json;

/// The outcome of a handler that returned `value`, which is encoded where its type keeps results. The error is one that fails the task.
pub(crate) fn completed(value: &Bound<'_, PyAny>, kind: usize, settings: &Settings) -> PyResult<Outcome> {
    let Some(ttl) = settings.kinds[kind].result_ttl else { return Ok(Outcome::Completed) };
    let limit = settings.result_limit;
    let (is_json, encoded) = encode(value, limit);
    match encoded {
        Ok(bytes) if bytes.len() <= limit => {
            let returned = Returned { seconds: ttl.as_secs_f64(), is_json, value: bytes };
            Ok(Outcome::Returned(Box::new(returned)))
        }
        Ok(_) => Err(refused(value, format!("result has more than {limit} bytes once it is encoded (result_limit)"))),
        Err(message) => Err(refused(value, message)),
    }
}

/// As a payload: bytes as they are, anything else as JSON. Whether it is JSON, and its bytes; of those over the limit perhaps a part.
fn encode(value: &Bound<'_, PyAny>, limit: usize) -> (bool, Result<Vec<u8>, String>) {
    if let Ok(bytes) = value.cast::<PyBytes>() {
        let kept = bytes.as_bytes();
        return (false, Ok(kept[..kept.len().min(limit.saturating_add(1))].to_vec()));
    }
    if let Ok(array) = value.cast::<PyByteArray>() {
        return (false, Ok(array.to_vec()));
    }
    if value.is_instance_of::<PyMemoryView>() {
        let bytes = value.call_method0("tobytes").and_then(|b| b.extract::<Vec<u8>>());
        return (false, bytes.map_err(|e| format!("result: {e}")));
    }
    (true, json::encode_result(value, limit))
}

fn refused(value: &Bound<'_, PyAny>, message: String) -> PyErr {
    let py = value.py();
    let class = py.import("fastq.errors").and_then(|errors| errors.getattr("ResultError"));
    class.and_then(|class| class.call1((message,))).map_or_else(|e| e, PyErr::from_value)
}
