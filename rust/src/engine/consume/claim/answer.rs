//! Reading a claim's answer: a row a chunk, content as arrays.

use std::sync::Arc;

use tokio_postgres::Row;

use crate::engine::consume::claim::{Brought, Claimer};
use crate::engine::consume::counters::Counters;
use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::task::{Chunk, Failure, Holder, Outcome};
use crate::engine::error::{Error, Result};
use crate::engine::logs::Level;
use crate::engine::wire::Elements;

impl Claimer<'_> {
    /// One row of the claim's answer: a run of tasks of one chunk.
    pub(super) async fn read(&mut self, row: &Row, epoch: u32, brought: &mut Brought) -> Result<Chunk> {
        let (no, lane_id, track, rid, leaf): (i64, i32, i16, i64, i16) =
            (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
        let (attempts, max_attempts, lo, hi, shrunk): (i16, i16, i64, i64, bool) =
            (row.get(5), row.get(6), row.get(7), row.get(8), row.get(9));
        let lane = self.lanes.iter_mut().find(|l| l.id == lane_id);
        let lane =
            lane.ok_or_else(|| Error::lost(format!("the claim brought lane {lane_id}, which was not asked for")))?;
        let mut chunk = Chunk::new(epoch, no, lane.kind, Arc::clone(&lane.queue), track, attempts, max_attempts);
        chunk.name = Arc::clone(&lane.name);
        let columns: [Option<Elements<'_>>; 4] = [row.get(10), row.get(11), row.get(12), row.get(13)];
        if let [Some(ids), Some(created), Some(formats), Some(payloads)] = columns {
            chunk.fill(ids, created, formats, payloads);
        }
        self.leaf = leaf;
        let expected = usize::try_from(hi - lo + 1).unwrap_or(0);
        if chunk.ids().len() + chunk.unreadable().len() < expected {
            self.find_missing(&mut chunk, leaf, lo, hi).await?;
        }
        for (id, why) in chunk.unreadable() {
            self.fail(&chunk, *id, format!("the task's own timeout and retry can't be read: {why}"));
        }
        if row.get(14) {
            self.find_lefts(&mut chunk, leaf, lo, hi).await?;
        }
        let taken = brought.lanes.entry((lane_id, track)).or_default();
        taken.0 += 1;
        taken.1 += hi - lo + 1;
        taken.2 = taken.2.max(if shrunk { rid } else { rid + 1 });
        brought.tasks += chunk.ids().len();
        Ok(chunk)
    }

    /// When its tasks expire, as a time of ours. What is on the way here is the tasks' gain: none ends before its time.
    async fn find_lefts(&self, chunk: &mut Chunk, leaf: i16, lo: i64, hi: i64) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        Counters::add(&self.shared.counters.statements, 1);
        let rows = link.query("read_lefts", &[&leaf, &lo, &hi]).await?;
        let lefts = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        chunk.expire(&lefts, Moment::now());
        Ok(())
    }

    /// Fewer rows than ids: an edit or a move overtook the claim's snapshot, or the content of a single task lies in another leaf than the
    /// last one's. A new statement sees them; what is still missing has no content any more and fails for good. Content that can't be read
    /// goes back, for claims of one task that read where it lies: such a claim fails by itself, and finds out which task it is.
    async fn find_missing(&mut self, chunk: &mut Chunk, leaf: i16, lo: i64, hi: i64) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        let missing: Vec<i64> = (lo..=hi).filter(|&id| !chunk.knows(id)).collect();
        let rows = match link.query("read_tasks", &[&leaf, &missing]).await {
            Err(e) if e.is_data_fault() => {
                self.search.look_closer();
                self.give_back(chunk, missing);
                return Ok(());
            }
            rows => rows?,
        };
        for row in rows {
            let (created, payload): (Timestamp, &[u8]) = (row.get(1), row.get(3));
            chunk.push(row.get(0), created.0, row.get::<_, i8>(2).cast_unsigned(), payload);
        }
        for id in missing.into_iter().filter(|&id| !chunk.knows(id)) {
            self.fail(chunk, id, "the task's content is missing".to_owned());
        }
        Ok(())
    }

    /// Gives back tasks of a claim whose content could not be read.
    fn give_back(&self, chunk: &Chunk, ids: Vec<i64>) {
        *self.books.borrow_mut().held.entry((chunk.epoch, chunk.no)).or_default() += ids.len() as u64;
        let give = |id| Ended::given_back(Holder { epoch: chunk.epoch, no: chunk.no, id });
        self.shared.outcomes.append(&mut ids.into_iter().map(give).collect());
    }

    /// Fails a task for good that no handler can be given.
    fn fail(&self, chunk: &Chunk, id: i64, error: String) {
        self.shared.log(Level::Error, "claimer", format!("task {id} is failed: {error}"));
        let failure = Failure { delay: None, error, traceback: String::new() };
        *self.books.borrow_mut().held.entry((chunk.epoch, chunk.no)).or_default() += 1;
        let holder = Holder { epoch: chunk.epoch, no: chunk.no, id };
        self.shared.outcomes.push(Ended { holder, took_us: 0, outcome: Outcome::Failed(Box::new(failure)) });
    }
}

/// A `timestamptz` as it lies in the answer: microseconds since 2000-01-01 UTC.
struct Timestamp(i64);

impl<'a> postgres_types::FromSql<'a> for Timestamp {
    fn from_sql(
        _: &postgres_types::Type,
        raw: &'a [u8],
    ) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &postgres_types::Type) -> bool {
        *ty == postgres_types::Type::TIMESTAMPTZ
    }
}
