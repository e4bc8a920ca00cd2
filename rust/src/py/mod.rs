//! What Python sees: `fastq._core`. The only place that names PyO3.

mod complete;
mod dsn;
mod engine;
mod error;
mod json;
mod mailbox;
mod producer;
mod result;
mod run_options;
mod task;
mod task_in;
mod testing;
mod tx;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::engine::{process, rights, sql};
use error::OrRaise;

/// The statements of sql/queries by name, as written.
#[pyfunction]
fn queries(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let all = PyDict::new(py);
    for (name, text) in sql::QUERIES {
        all.set_item(name, text)?;
    }
    Ok(all)
}

/// Schema steps in order: version, name, up, down.
#[pyfunction]
fn migrations() -> Vec<(i32, &'static str, &'static str, &'static str, &'static str)> {
    sql::MIGRATIONS.to_vec()
}

/// The text of sql/grants by kind of role, as written.
#[pyfunction]
fn grants() -> Vec<(&'static str, &'static str)> {
    sql::GRANTS.to_vec()
}

/// The rights that a kind of role is granted: on what, its name, which, of which column.
#[pyfunction]
fn rights_of(role: &str) -> Vec<(String, String, String, String)> {
    rights::of(role).into_iter().map(|r| (r.on, r.name, r.privilege, r.column)).collect()
}

/// `text` with `fastq.` replaced by the quoted schema.
#[pyfunction]
fn render(py: Python<'_>, text: &str, schema: &str) -> PyResult<String> {
    sql::render(text, schema).or_raise(py)
}

/// A child has a number of its own.
#[pyfunction]
fn after_fork() {
    process::renew();
}

/// The compiled half of fastq.
#[pymodule]
mod _core {
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::{grants, migrations, queries, render, rights_of};

    #[pymodule_export]
    use super::complete::TxCompletion;

    #[pymodule_export]
    use super::dsn::{complete_dsn, parse_dsn};

    #[pymodule_export]
    use super::producer::{EnqueuedIds, ProducerCore, encode_json};

    #[pymodule_export]
    use super::engine::Engine;

    #[pymodule_export]
    use super::task::{TaskInfo, running_task};

    #[pymodule_export]
    use super::testing::{cancel_made, make_task};

    #[pymodule_export]
    use super::tx::TxTasks;

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's name")]
    const version: &str = env!("CARGO_PKG_VERSION");

    /// Whoever forks an interpreter and goes on in the child runs these hooks; where there is no fork, there is no such function.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        if let Some(register) = py.import("os")?.getattr_opt("register_at_fork")? {
            let hooks = PyDict::new(py);
            hooks.set_item("after_in_child", wrap_pyfunction!(super::after_fork, module)?)?;
            register.call((), Some(&hooks))?;
        }
        Ok(())
    }
}
