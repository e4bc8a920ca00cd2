//! Connection strings for the cold path: psycopg connects there, and is told what the engine understands.

use std::collections::BTreeMap;

use pyo3::prelude::*;

use crate::engine::connect::{self, Words};
use crate::engine::error::Error;
use crate::py::error::OrRaise;

/// The words of a connection string, and whether a message may quote them.
#[pyfunction]
pub(crate) fn parse_dsn(py: Python<'_>, dsn: &str) -> PyResult<(Words, bool)> {
    let given = connect::parse(dsn).or_raise(py)?;
    Ok((given.words, !given.is_ambiguous))
}

/// `words` with what the service file and the environment add; refuses what the engine can't follow.
#[pyfunction]
pub(crate) fn complete_dsn(py: Python<'_>, words: BTreeMap<String, String>) -> PyResult<Words> {
    let complete = || -> Result<Words, Error> {
        let words = connect::complete(&connect::known(words)?)?;
        connect::check(&words)?;
        Ok(words)
    };
    complete().or_raise(py)
}
