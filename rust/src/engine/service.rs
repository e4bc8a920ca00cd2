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
        let ended = std::panic::catch_unwind(run);
        // Not dropped: that would wait for a name's look-up that was given up, for as long as the system's resolver tries.
        runtime.shutdown_background();
        let cause = ended.err().map(|panic| {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    /// As a name's look-up that nobody answers: on a thread that can't be interrupted.
    #[test]
    fn what_was_given_up_holds_no_thread_up() {
        let (release, held) = mpsc::channel::<()>();
        let main = move || async move {
            let look_up = tokio::task::spawn_blocking(move || held.recv());
            assert!(tokio::time::timeout(Duration::from_millis(10), look_up).await.is_err());
        };
        let thread = spawn("test", Arc::default(), main, |cause| assert_eq!(cause, None)).expect("spawned");
        let until = Instant::now() + Duration::from_secs(10);
        while !thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        let has_ended = thread.is_finished();
        // Released in any case: what is left waits for it.
        drop(release);
        assert!(has_ended, "it waits for what was given up");
        thread.join().expect("no panic");
    }
}
