//! The I/O thread: one native thread with a current-thread runtime for each consumer engine and each producer.

use std::sync::Arc;
use std::thread;

use tokio::runtime::Builder;

use crate::engine::error::{Error, Kind, Result};
use crate::engine::logs::{Level, Outbox};

/// Starts the thread `name`; `main` makes the future that it runs to its end. A panic is caught, logged, and `on_end` still runs, so
/// that nobody waits for a thread that is gone.
pub fn spawn<F, M, E>(name: &str, outbox: Arc<Outbox>, main: M, on_end: E) -> Result<thread::JoinHandle<()>>
where
    F: Future<Output = ()>,
    M: FnOnce() -> F + Send + 'static,
    E: FnOnce(Option<String>) + Send + 'static,
{
    let failed = |e: std::io::Error| Error::new(Kind::Consumer, format!("the I/O thread could not start: {e}"));
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let body = move || {
        let run = std::panic::AssertUnwindSafe(|| runtime.block_on(main()));
        let cause = std::panic::catch_unwind(run).err().map(|panic| {
            let text =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            format!("the I/O thread panicked: {}", text.unwrap_or("without a message"))
        });
        if let Some(cause) = &cause {
            outbox.log(Level::Error, "engine", cause.clone());
        }
        on_end(cause);
        outbox.end();
    };
    thread::Builder::new().name(name.to_owned()).spawn(body).map_err(failed)
}
