//! What the producer's own connection does for a transaction on the user's: ids, lanes, the wake-up after its commit.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tokio::time::sleep;

use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::notify::announce;
use crate::engine::produce::shared::Shared;
use crate::engine::produce::task::LaneKey;
use crate::engine::produce::texts::AnyText;
use crate::engine::produce::tx::Supplied;
use crate::engine::produce::{Command, Producer, closed};

/// Looks for a commit that was about to be sent, each after twice the pause of the one before: 1 s in all.
const LOOKS: u32 = 10;
/// The first pause.
const LOOK_AFTER: Duration = Duration::from_millis(1);

impl Producer {
    /// Reserves `n` ids, and finds or makes the lanes, each committed before the answer comes.
    pub fn supply(&self, keys: Vec<Arc<LaneKey>>, n: usize) -> Result<Receiver<Result<Supplied>>> {
        self.lend(move |shared| async move {
            let deadline = shared.connect_deadline();
            let mut lanes = Vec::with_capacity(keys.len());
            for key in &keys {
                lanes.push(shared.lane(key, deadline).await?);
            }
            let (leaf, runs) = shared.take_ids(n, deadline).await?;
            Ok(Supplied { leaf, lanes, runs })
        })
    }

    /// Which server and database the producer's own connection is in: the answer of `find_home.sql`.
    pub fn home(&self) -> Result<Receiver<Result<String>>> {
        self.lend(|shared| async move {
            let rows = shared.ask(shared.connect_deadline(), "find_home", &[]).await?;
            let row = rows.first().ok_or_else(|| Error::lost("the server did not say which it is"))?;
            Ok(row.try_get::<_, AnyText>(0)?.0)
        })
    }

    /// Wakes consumers: somebody's transaction brought tasks to these lanes. With a witness it was only about to commit, so the task of
    /// that id is looked for first; one that does not come was rolled back, or is found by the next poll.
    pub fn wake(&self, lanes: Vec<i32>, witness: Option<i64>) -> Result<()> {
        self.lend(move |shared| async move {
            let mut is_in = witness.is_none();
            let ids: Vec<_> = witness.into_iter().collect();
            for look in 0..LOOKS {
                if is_in {
                    break;
                }
                sleep(LOOK_AFTER * 2u32.pow(look)).await;
                is_in = !shared.ask(shared.connect_deadline(), "find_enqueued", &[&ids]).await?.is_empty();
            }
            if is_in {
                announce(&shared, lanes.into_iter());
            }
            Ok(())
        })
        .map(drop)
    }

    /// Forgets reserved ids: some of them turned out to be taken.
    pub fn forget_ids(&self) {
        self.shared.forget_ids();
    }

    /// Runs `work` on the I/O thread.
    fn lend<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Shared>) -> F,
    ) -> Result<Receiver<Result<T>>> {
        let (sender, receiver) = sync_channel(1);
        let work = work(Arc::clone(&self.shared));
        // Nobody has to wait for the answer.
        let answer = async move { drop(sender.try_send(work.await)) };
        self.start(|running| running.commands.send(Command::Run(Box::pin(answer))))?.map_err(|_| closed())?;
        Ok(receiver)
    }
}

/// The I/O thread ended before it answered: nothing was written yet.
pub fn unanswered() -> Error {
    Error::new(Kind::Enqueue, "the producer's I/O thread ended before it answered")
}
