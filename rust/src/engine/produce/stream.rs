//! A streaming `enqueue_many` on the I/O thread: batches come from the caller, and go out by COPY in one transaction, or in one each
//! `commit_every` tasks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedMutexGuard;
use tokio::time::{sleep, timeout};

use crate::engine::connect::{Backoff, Link};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::logs::Level;
use crate::engine::produce::batch;
use crate::engine::produce::copy::Batch;
use crate::engine::produce::handoff::{Ending, Message};
use crate::engine::produce::ids::EnqueuedIds;
use crate::engine::produce::keep::Kept;
use crate::engine::produce::notify::announce;
use crate::engine::produce::shared::{PART, Shared, Stats};
use crate::engine::produce::witness::Witness;

/// How long a transaction waits for the stream connection while another one uses it; then it gets one of its own, so that no call
/// waits for the iterable of another (or for ever: the iterable may enqueue too).
const SEAT_WAIT: Duration = Duration::from_secs(1);
/// Times that a transaction is sent anew.
const TRIES: usize = 20;
/// The same, where a name was taken in the server's session, which each next try gives another.
const NAMES: usize = 1000;

/// Serves one call to its end.
pub(super) async fn run(shared: Arc<Shared>, ending: Ending) {
    let mut stream = Stream { shared, ids: EnqueuedIds::default(), tx: Tx::default(), prefilter: false };
    let result = stream.serve(&ending).await;
    stream.close().await;
    let committed = ending.handoff().committed();
    let ids = std::mem::take(&mut stream.ids);
    ending.end(result.map(|()| ids).map_err(|e| Error { committed: (committed > 0).then_some(committed), ..e }));
}

/// The transaction that is open, or the next one.
#[derive(Default)]
struct Tx {
    seat: Option<Seat>,
    /// BEGIN was sent.
    is_open: bool,
    /// COMMIT was sent.
    is_committing: bool,
    /// Its batches, to send them again after a deadlock or a lost connection.
    kept: Kept,
    /// How many of them were sent.
    sent: usize,
    /// Results before it.
    base: u64,
    /// Tasks in it that are no duplicates.
    fresh: usize,
    witness: Option<Witness>,
    /// It changes tasks that hold tokens.
    has_swaps: bool,
    lanes: Vec<i32>,
    tries: usize,
    /// Since when connections have been lost, one after the other.
    lost_at: Option<Instant>,
    backoff: Backoff,
}

/// A connection to stream on: the producer's, or one that ends with the transaction.
struct Seat {
    kept: Option<OwnedMutexGuard<Option<Arc<Link>>>>,
    link: Arc<Link>,
}

struct Stream {
    shared: Arc<Shared>,
    ids: EnqueuedIds,
    tx: Tx,
    /// The last batch met tokens that others hold: look for them before ids are given, so that their gaps don't cut chunks.
    prefilter: bool,
}

impl Stream {
    async fn serve(&mut self, ending: &Ending) -> Result<()> {
        let limit = self.shared.settings.iterable_timeout;
        loop {
            match ending.handoff().next(self.tx.is_open.then_some(limit)).await {
                Some(Message::Batch(batch)) => {
                    let commit = batch.commit;
                    self.tx.kept.push(*batch);
                    self.advance(commit, ending).await?;
                }
                Some(Message::Finish) => {
                    if self.tx.is_open {
                        self.advance(true, ending).await?;
                    }
                    return Ok(());
                }
                Some(Message::Abort) => return Err(Error::new(Kind::Enqueue, "the call was given up")),
                None => {
                    let seconds = limit.as_secs_f64();
                    let message = format!(
                        "the iterable gave nothing for {seconds} s while its transaction was open: the transaction was rolled back"
                    );
                    return Err(Error::new(Kind::Enqueue, message));
                }
            }
        }
    }

    /// Sends what is not sent yet, and commits if `commit`; again from the transaction's start where that may help.
    async fn advance(&mut self, commit: bool, ending: &Ending) -> Result<()> {
        while let Err(e) = self.drive(commit).await {
            if self.recover(e).await? {
                break;
            }
        }
        if commit {
            let tasks = self.ids.len() - self.tx.base;
            ending.handoff().add_committed(tasks);
            announce(&self.shared, self.tx.lanes.iter().copied());
            Stats::add(&self.shared.stats.commits, 1);
            Stats::add(&self.shared.stats.enqueued, self.tx.fresh);
            self.shared.recover();
            self.tx = Tx { base: self.ids.len(), ..Tx::default() };
        } else {
            match self.tx.kept.make_room().await {
                Ok(true) => {}
                Ok(false) => self.tx.sent = 0,
                Err(e) => {
                    self.tx.sent = 0;
                    let message =
                        format!("a large enqueue_many could not be kept in a file and would fail in a deadlock: {e}");
                    self.shared.outbox.log(Level::Warning, PART, message);
                }
            }
        }
        Ok(())
    }

    async fn drive(&mut self, commit: bool) -> Result<()> {
        let link = self.sit().await?;
        if self.tx.sent == self.tx.kept.len() && commit {
            self.tx.is_committing = true;
            Stats::add(&self.shared.stats.statements, 1);
            return link.batch("COMMIT").await;
        }
        let mut place = Batch::default();
        let unreadable =
            |e: std::io::Error| Error::new(Kind::Enqueue, format!("a kept batch could not be read back: {e}"));
        while let Some(batch) = self.tx.kept.get(self.tx.sent, &mut place).await.map_err(unreadable)? {
            let is_last = self.tx.sent + 1 == self.tx.kept.len();
            let job = batch::Job {
                shared: &self.shared,
                link: &link,
                batch,
                begin: !self.tx.is_open,
                commit: commit && is_last,
                prefilter: self.prefilter,
            };
            self.tx.is_open = true;
            let ready = job.prepare().await.map_err(|e| self.place(e))?;
            self.tx.has_swaps |= !ready.swaps.is_empty();
            self.prefilter = ready.duplicates * 100 > batch.len;
            ready.answer(batch, &mut self.ids);
            self.tx.fresh += batch.len - ready.duplicates;
            self.tx.lanes.extend(ready.lanes(batch));
            self.tx.lanes.sort_unstable();
            self.tx.lanes.dedup();
            if self.tx.witness.is_none() {
                self.tx.witness = ready.witness(batch);
            }
            self.tx.is_committing = commit && is_last;
            job.send(ready).await?;
            self.tx.sent += 1;
        }
        Ok(())
    }

    /// A duplicate's place in the call, not in its batch; what the transaction itself wrote is rolled back with it and names nobody.
    fn place(&self, e: Error) -> Error {
        let Kind::Duplicate { existing } = e.kind else { return e };
        let mut own = (self.tx.base..self.ids.len()).filter_map(|n| self.ids.get(n));
        let existing = existing.filter(|&id| !own.any(|each| each == (id, true)));
        let index = self.ids.len() + e.index.unwrap_or(0);
        Error::duplicate(existing).at(index)
    }

    /// After an error: true where the commit turned out to be in, false where the transaction is to be sent again.
    async fn recover(&mut self, error: Error) -> Result<bool> {
        let tx = &mut self.tx;
        if error.is_lost() {
            if let Some(mut seat) = tx.seat.take() {
                Stats::add(&self.shared.stats.reconnects, 1);
                self.shared.complain("lost a stream's connection", &error);
                if let Some(kept) = &mut seat.kept {
                    **kept = None;
                }
            } else {
                // It could not even be made.
                return Err(error);
            }
            if tx.is_committing {
                match &tx.witness {
                    Some(witness) if witness.settle(&self.shared).await? => return Ok(true),
                    Some(_) => {}
                    // Sent again, it comes to the same.
                    None if tx.has_swaps => {}
                    // Nothing was written: each task's token is somebody else's, whether it was committed or not.
                    None => return Ok(true),
                }
            }
        } else if let Some(seat) = &tx.seat {
            seat.link.batch("ROLLBACK").await?;
        }
        let limit = self.shared.settings.statement_timeout.max(self.shared.settings.connect_timeout);
        let is_late = error.is_lost() && tx.lost_at.get_or_insert_with(Instant::now).elapsed() >= limit;
        // 42P05: behind a pooler, where others may have left names in the server's session.
        let most = if error.sqlstate() == Some("42P05") { NAMES } else { TRIES };
        let may_pass = error.is_lost() || matches!(error.sqlstate(), Some("40P01" | "40001" | "23505" | "42P05"));
        tx.tries += 1;
        if !may_pass || is_late || tx.kept.is_cut() || tx.tries > most {
            let message = match error.sqlstate() {
                Some("55P03") => format!("another open transaction holds an idempotency token of the call: {error}"),
                _ => error.message.clone(),
            };
            return Err(Error { message, ..error });
        }
        if error.is_lost() {
            sleep(tx.backoff.delay()).await;
        }
        if error.sqlstate() == Some("23505") {
            // Somebody else's tasks have these ids: the sequence went back with a crashed server.
            self.shared.forget_ids();
        }
        self.ids.truncate(tx.base);
        (tx.is_open, tx.is_committing, tx.sent, tx.fresh, tx.witness) = (false, false, 0, 0, None);
        tx.has_swaps = false;
        tx.lanes.clear();
        Ok(false)
    }

    /// The transaction's connection, taken or made now if it has none.
    async fn sit(&mut self) -> Result<Arc<Link>> {
        if let Some(seat) = &self.tx.seat {
            return Ok(Arc::clone(&seat.link));
        }
        let deadline = self.shared.connect_deadline();
        let mut kept = timeout(SEAT_WAIT, Arc::clone(&self.shared.bulk).lock_owned()).await.ok();
        let found = kept.as_ref().and_then(|kept| kept.as_ref().filter(|link| !link.is_closed()).cloned());
        let link = match found {
            Some(link) => link,
            None => Arc::new(self.shared.connect(deadline).await?),
        };
        if let Some(kept) = &mut kept {
            **kept = Some(Arc::clone(&link));
        }
        self.tx.seat = Some(Seat { kept, link: Arc::clone(&link) });
        Ok(link)
    }

    /// Rolls back what is open.
    async fn close(&mut self) {
        if let Some(mut seat) = self.tx.seat.take()
            && self.tx.is_open
            && seat.link.batch("ROLLBACK").await.is_err()
            && let Some(kept) = &mut seat.kept
        {
            **kept = None;
        }
    }
}
