//! One task of a transaction whose commit was cut off: where it is, all are; where it can't be, none is.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::engine::connect::{Backoff, Link};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::copy::{Group, RowView};
use crate::engine::produce::flight::rolled_back;
use crate::engine::produce::shared::{Line, Param, Shared};
use crate::engine::produce::task::When;

/// A task that the transaction writes.
#[derive(Debug, Clone)]
pub(super) struct Witness {
    id: i64,
    lane: i32,
    leaf: i16,
    max_attempts: i16,
    format: i8,
    payload: Vec<u8>,
    when: Option<When>,
}

impl Witness {
    /// Row `n` of `group`.
    pub(super) fn new(id: i64, lane: i32, leaf: i16, group: &Group, n: usize, row: RowView<'_>) -> Self {
        let when = group.whens.get(n).copied();
        let (format, payload) = (row.format(), row.payload().to_vec());
        Self { id, lane, leaf, max_attempts: group.max_attempts, format, payload, when }
    }

    /// Was the transaction committed? An error says that it could not be found out in time.
    pub(super) async fn settle(&self, shared: &Shared) -> Result<bool> {
        let apart = Line::default();
        let until = Instant::now() + shared.settings.statement_timeout.max(shared.settings.connect_timeout);
        let mut backoff = Backoff::default();
        loop {
            let answer = match apart.get(shared, until).await {
                Ok(link) => {
                    let answer = self.ask(&link).await;
                    if let Err(e) = &answer
                        && e.is_lost()
                    {
                        apart.forget(shared, &link, e).await;
                    }
                    answer
                }
                Err(e) => Err(e),
            };
            match answer {
                Ok(Some(answer)) => return Ok(answer),
                Err(e) if Instant::now() >= until => {
                    let message =
                        format!("the commit's answer was lost, and what became of it could not be found out: {e}");
                    return Err(Error::new(Kind::ConnectionLost { in_doubt: true }, message));
                }
                // Somebody's transaction is in the way, and soon over.
                Ok(None) => sleep(Duration::from_millis(20)).await,
                // A server that lets us in and then refuses, as while it recovers, would be asked without end.
                Err(_) => sleep(backoff.delay().min(until.saturating_duration_since(Instant::now()))).await,
            }
        }
    }

    /// None: ask again.
    async fn ask(&self, link: &Link) -> Result<Option<bool>> {
        if let Some(is_ours) = self.look(link).await? {
            return Ok(Some(is_ours));
        }
        // Not to be seen: aborted, or still under way in a backend that doesn't know of its client's end. A row with the same id in the
        // same leaf waits for that one; if it goes in, the other can't be there any more.
        let begin = "BEGIN; SET LOCAL lock_timeout = '2s'";
        let ids = [self.id];
        let (lanes, max_attempts, formats, payloads) =
            ([self.lane], [self.max_attempts], [self.format], [&self.payload[..]]);
        let probed = async {
            link.batch(begin).await?;
            // What goes away again need not expire.
            let none_time: &[Option<std::time::SystemTime>] = &[];
            if let Some(when) = self.when {
                let (delay, time) = when.columns();
                let params: [Param<'_>; 8] = [
                    &&ids[..],
                    &&lanes[..],
                    &&max_attempts[..],
                    &&formats[..],
                    &&payloads[..],
                    &&[delay][..],
                    &&[time][..],
                    &none_time,
                ];
                link.execute("delay_tasks", &params).await?;
                // It may have been promoted in between; then there is more than what was just written.
                return Ok(link.query("find_enqueued", &[&&ids[..]]).await?.len() > 1);
            }
            let (none, none_small, none_int): (&[i64], &[i16], &[i32]) = (&[], &[], &[]);
            let silent: Option<&str> = None;
            let params: [Param<'_>; 13] = [
                &self.leaf,
                &&ids[..],
                &&lanes[..],
                &&max_attempts[..],
                &&formats[..],
                &&payloads[..],
                &none_int,
                &none_small,
                &none_int,
                &none,
                &none,
                &silent,
                &silent,
            ];
            link.execute("enqueue_tasks", &params).await?;
            Ok(false)
        };
        match rolled_back(link, probed.await).await {
            Ok(is_there) => {
                link.batch("ROLLBACK").await?;
                Ok(Some(is_there))
            }
            Err(e) if matches!(e.sqlstate(), Some("23505" | "55P03")) => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn look(&self, link: &Link) -> Result<Option<bool>> {
        let rows = link.query("find_enqueued", &[&&[self.id][..]]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (lane, payload): (i32, &[u8]) = (row.try_get(1)?, row.try_get(2)?);
        Ok(Some(lane == self.lane && payload == self.payload))
    }
}
