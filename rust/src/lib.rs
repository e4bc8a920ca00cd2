//! The engine of fastq: it claims, completes and enqueues tasks on PostgreSQL, in batches, and never waits for Python.
//!
//! [`engine`] is the queue and knows nothing of Python; `py`, behind the cargo feature `python`, is the skin that Python sees.
//!
//! Threads: every consumer engine and every producer has one native thread (`fastq-io`) with a current-thread tokio runtime, which
//! does all input and output and never attaches to the interpreter. Handler threads and event loops are Python's own; they come in
//! through `py`, take batches and leave outcomes under short locks.

pub mod engine;
#[cfg(feature = "python")]
mod py;
