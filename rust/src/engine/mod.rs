//! The queue: no PyO3 type occurs below here.

pub mod connect;
pub mod consume;
pub mod error;
pub mod logs;
pub mod process;
pub mod produce;
pub mod rights;
pub mod run_options;
pub mod service;
pub mod sql;
pub mod wire;
