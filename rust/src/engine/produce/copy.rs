//! Rows for binary COPY, written where the task is read and finished when its lane and id are known.
//!
//! A batch keeps the rows of tasks that are alike (lane, `max_attempts`, delayed or not, with a time to expire or not) together, so that their ids run without gaps
//! and make few chunks. Ids, lane and leaf are left open until the batch is sent: only then is it known which are free.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};

use crate::engine::produce::task::{Format, LaneKey, NewTask, Scope, TokenRule, When, expiries};

/// What every binary COPY starts with: signature, no flags, no extension.
pub const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// And ends with.
pub const TRAILER: &[u8] = &[0xff, 0xff];
/// Tasks and payload bytes that a chunk may hold: what one claim takes at a time.
pub const CHUNK_TASKS: i64 = 500;
/// See [`CHUNK_TASKS`].
pub const CHUNK_BYTES: usize = 1024 * 1024;
/// Bytes of one COPY message: few enough to overlap with the server's work, enough that messages cost nothing.
pub const BLOCK_BYTES: usize = 128 * 1024;

// Where each field's value lies in a row of copy_tasks.sql (id, lane, leaf, max_attempts, format, payload).
const ID: usize = 6;
const LANE: usize = 18;
const LEAF: usize = 26;
const PAYLOAD_SIZE: usize = 39;
const PAYLOAD: usize = 43;

/// A row up to its payload, with everything open that is not yet known.
fn row_head(max_attempts: i16, format: Format) -> [u8; PAYLOAD] {
    let mut head = [0; PAYLOAD];
    head[1] = 6; // fields
    head[5] = 8; // id
    head[17] = 4; // lane
    head[25] = 2; // leaf
    head[31] = 2; // max_attempts
    head[32..34].copy_from_slice(&max_attempts.to_be_bytes());
    head[37] = 1; // format
    head[38] = format.code().cast_unsigned();
    head
}

/// One row of a group, as it lies in the buffer.
#[derive(Debug, Clone, Copy)]
pub struct RowView<'a>(&'a [u8]);

impl<'a> RowView<'a> {
    /// The payload.
    pub fn payload(self) -> &'a [u8] {
        &self.0[PAYLOAD..]
    }

    /// The column `format`.
    pub fn format(self) -> i8 {
        self.0[38].cast_signed()
    }
}

/// Rows one after the other.
#[derive(Debug, Clone)]
pub struct Rows<'a>(&'a [u8]);

fn row_size(rows: &[u8]) -> Option<usize> {
    let size = rows.get(PAYLOAD_SIZE..PAYLOAD)?;
    Some(PAYLOAD + u32::from_be_bytes(size.try_into().ok()?) as usize)
}

impl<'a> Iterator for Rows<'a> {
    type Item = RowView<'a>;

    fn next(&mut self) -> Option<RowView<'a>> {
        let (row, rest) = self.0.split_at_checked(row_size(self.0)?)?;
        self.0 = rest;
        Some(RowView(row))
    }
}

/// Tasks of a batch that are alike.
#[derive(Debug)]
pub struct Group {
    /// Their queue, type and priority.
    pub lane: Arc<LaneKey>,
    /// Their runs in all.
    pub max_attempts: i16,
    /// Whether its tasks wait for a time.
    pub is_delayed: bool,
    /// When each may start; empty where they may start at once.
    pub whens: Vec<When>,
    /// When each expires, in microseconds since the Unix epoch; empty where none does.
    pub expiries: Vec<i64>,
    /// How many there are.
    pub len: usize,
    pub(super) rows: Vec<u8>,
}

/// A chunk of `ready`, born complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The lane's id.
    pub lane: i32,
    /// Of its tasks.
    pub max_attempts: i16,
    /// The payload of one task, the mean rounded up.
    pub task_bytes: i32,
    /// Its first id.
    pub lo: i64,
    /// Its last id.
    pub hi: i64,
    /// When the first of its tasks expires, if they do.
    pub expires_at: Option<i64>,
}

/// Cuts a sequence of alike tasks into chunks: runs without gaps, of limited length and payload.
#[derive(Debug)]
pub struct Chunker {
    chunks: Vec<Chunk>,
    bytes: usize,
    is_cut: bool,
}

impl Chunker {
    /// Nothing cut yet.
    pub fn new() -> Self {
        Self { chunks: Vec::new(), bytes: 0, is_cut: false }
    }

    /// The next task starts a chunk of its own.
    pub fn cut(&mut self) {
        self.close();
        self.is_cut = true;
    }

    /// Adds the next task.
    pub fn push(&mut self, id: i64, lane: i32, max_attempts: i16, payload: usize, expires_at: Option<i64>) {
        let bytes = self.bytes + payload;
        match self.chunks.last_mut() {
            Some(c)
                if !self.is_cut
                    && c.hi + 1 == id
                    && (c.lane, c.max_attempts) == (lane, max_attempts)
                    && c.expires_at.is_some() == expires_at.is_some()
                    && id - c.lo < CHUNK_TASKS
                    && bytes <= CHUNK_BYTES =>
            {
                c.hi = id;
                c.expires_at = c.expires_at.min(expires_at);
                self.bytes = bytes;
            }
            _ => {
                self.close();
                self.is_cut = false;
                self.chunks.push(Chunk { lane, max_attempts, task_bytes: 0, lo: id, hi: id, expires_at });
                self.bytes = payload;
            }
        }
    }

    fn close(&mut self) {
        if let Some(c) = self.chunks.last_mut() {
            let tasks = usize::try_from(c.hi - c.lo + 1).unwrap_or(1);
            c.task_bytes = i32::try_from(self.bytes.div_ceil(tasks)).unwrap_or(i32::MAX);
        }
    }

    /// The chunks.
    pub fn finish(mut self) -> Vec<Chunk> {
        self.close();
        self.chunks
    }
}

impl Default for Chunker {
    fn default() -> Self {
        Self::new()
    }
}

impl Group {
    /// Its rows.
    pub fn rows(&self) -> Rows<'_> {
        Rows(&self.rows)
    }

    /// Whether its tasks expire. They are not copied: such rows have a column more.
    pub fn expires(&self) -> bool {
        !self.expiries.is_empty()
    }

    /// Bytes of its rows.
    pub fn bytes(&self) -> usize {
        self.rows.len()
    }

    /// Finished rows for COPY, with lane, leaf and ids filled in, appended to `blocks`; rows whose id is `None` are left out. The
    /// group stays as it is, so that a transaction that was rolled back can be sent again.
    pub fn finish(
        &self,
        home: Home,
        ids: impl Iterator<Item = Option<i64>>,
        chunker: &mut Chunker,
        blocks: &mut Blocks,
    ) {
        for (row, id) in self.rows().zip(ids) {
            let Some(id) = id else { continue };
            let out = blocks.room(row.0.len());
            let start = out.len();
            out.extend_from_slice(row.0);
            let row = &mut out[start..];
            row[ID..ID + 8].copy_from_slice(&id.to_be_bytes());
            row[LANE..LANE + 4].copy_from_slice(&home.lane.to_be_bytes());
            row[LEAF..LEAF + 2].copy_from_slice(&home.leaf.to_be_bytes());
            chunker.push(id, home.lane, self.max_attempts, row.len() - PAYLOAD, None);
        }
    }
}

/// Where tasks go: what a group's rows have in common.
#[derive(Debug, Clone, Copy)]
pub struct Home {
    /// The lane's id.
    pub lane: i32,
    /// The leaf of `task`.
    pub leaf: i16,
}

/// Finished rows in blocks of about [`BLOCK_BYTES`], the first of which starts with the header.
#[derive(Debug)]
pub struct Blocks {
    full: Vec<Bytes>,
    last: BytesMut,
}

impl Blocks {
    /// The header alone.
    pub fn new() -> Self {
        let mut last = BytesMut::with_capacity(BLOCK_BYTES);
        last.extend_from_slice(HEADER);
        Self { full: Vec::new(), last }
    }

    /// A buffer with room for a row of this size.
    fn room(&mut self, size: usize) -> &mut BytesMut {
        if self.last.len() + size > self.last.capacity() && !self.last.is_empty() {
            let next = BytesMut::with_capacity(BLOCK_BYTES.max(size));
            self.full.push(std::mem::replace(&mut self.last, next).freeze());
        }
        &mut self.last
    }

    /// All blocks, the trailer at their end.
    pub fn finish(mut self) -> Vec<Bytes> {
        self.last.extend_from_slice(TRAILER);
        self.full.push(self.last.freeze());
        self.full
    }
}

impl Default for Blocks {
    fn default() -> Self {
        Self::new()
    }
}

/// A task's token within a batch.
#[derive(Debug, Clone, Copy)]
pub struct TokenAt {
    /// Position of the task in the batch.
    pub task: u32,
    /// Its group, which knows the type.
    pub group: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    /// How it is meant.
    pub rule: TokenRule,
}

/// Tasks that are sent together.
#[derive(Debug, Default)]
pub struct Batch {
    /// The tasks, those that are alike together.
    pub groups: Vec<Group>,
    /// The group of each task in input order; empty while there is one group.
    pub order: Vec<u32>,
    /// Tokens in input order.
    pub tokens: Vec<TokenAt>,
    /// How many tasks.
    pub len: usize,
    /// Commit after it.
    pub commit: bool,
    pub(super) token_text: String,
    bytes: usize,
    known: HashMap<(usize, i16, bool, bool), usize>,
}

impl Batch {
    /// The group of such tasks.
    pub fn group(&mut self, lane: &Arc<LaneKey>, max_attempts: i16, is_delayed: bool, expires: bool) -> usize {
        let alike = |g: &Group| {
            Arc::ptr_eq(&g.lane, lane)
                && g.max_attempts == max_attempts
                && g.is_delayed == is_delayed
                && g.expires() == expires
        };
        // One type after the other is the rule; a load of one type never asks further.
        if self.groups.last().is_some_and(alike) {
            return self.groups.len() - 1;
        }
        let key = (Arc::as_ptr(lane) as usize, max_attempts, is_delayed, expires);
        if let Some(&at) = self.known.get(&key) {
            return at;
        }
        let at = self.groups.len();
        self.known.insert(key, at);
        let (lane, rows) = (Arc::clone(lane), Vec::new());
        self.groups.push(Group {
            lane,
            max_attempts,
            is_delayed,
            whens: Vec::new(),
            expiries: Vec::new(),
            len: 0,
            rows,
        });
        at
    }

    /// Appends a task: `encode` writes its payload at the end of the buffer. On an error the batch is as before.
    pub fn push<E>(
        &mut self,
        at: usize,
        when: Option<When>,
        expires_at: Option<i64>,
        token: Option<(&str, TokenRule)>,
        format: Format,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let groups = self.groups.len();
        let group = &mut self.groups[at];
        let start = group.rows.len();
        group.rows.extend_from_slice(&row_head(group.max_attempts, format));
        if let Err(e) = encode(&mut group.rows) {
            group.rows.truncate(start);
            return Err(e);
        }
        let size = group.rows.len() - start - PAYLOAD;
        // The payload limit is a fraction of what 32 bits hold.
        let stored = u32::try_from(size).unwrap_or(u32::MAX).to_be_bytes();
        group.rows[start + PAYLOAD_SIZE..start + PAYLOAD].copy_from_slice(&stored);
        group.len += 1;
        group.whens.extend(when);
        group.expiries.extend(expires_at);
        self.bytes += size + PAYLOAD;
        if groups > 1 {
            if self.order.is_empty() {
                self.order.resize(self.len, 0);
            }
            self.order.push(small(at));
        }
        if let Some((token, rule)) = token {
            let start = self.token_text.len();
            self.token_text.push_str(token);
            let (start, end) = (small(start), small(self.token_text.len()));
            self.tokens.push(TokenAt { task: small(self.len), group: small(at), start, end, rule });
            self.bytes += token.len();
        }
        self.len += 1;
        Ok(())
    }

    /// Bytes of all rows and tokens.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its tasks one by one, in input order: for the few that need no COPY.
    pub fn into_tasks(self) -> Vec<NewTask> {
        let mut rows: Vec<_> = self.groups.iter().map(|g| (g.rows(), g.whens.iter(), g.expiries.iter())).collect();
        let mut tokens = self.tokens.iter().peekable();
        let mut tasks = Vec::with_capacity(self.len);
        for n in 0..self.len {
            let at = self.order.get(n).map_or(0, |&at| at as usize);
            let Some(row) = rows[at].0.next() else { break };
            let token = tokens.next_if(|t| t.task as usize == n);
            let group = &self.groups[at];
            tasks.push(NewTask {
                lane: Arc::clone(&group.lane),
                max_attempts: group.max_attempts,
                format: row.format(),
                payload: row.payload().to_vec(),
                when: rows[at].1.next().copied(),
                expires_at: rows[at].2.next().copied(),
                token: token.map(|t| self.token(t).1.to_owned()),
                rule: token.map(|t| t.rule).unwrap_or_default(),
                is_of_many: true,
            });
        }
        tasks
    }

    /// A token's type, empty where it is unique for more, and its text.
    pub fn token(&self, at: &TokenAt) -> (&str, &str) {
        let kind = if at.rule.scope == Scope::Type { &self.groups[at.group as usize].lane.kind } else { "" };
        (kind, &self.token_text[at.start as usize..at.end as usize])
    }

    /// Tasks whose token must not be another's.
    pub fn raising(&self) -> impl Iterator<Item = usize> + '_ {
        self.tokens.iter().filter(|t| t.rule.raises()).map(|t| t.task as usize)
    }
}

/// A position in a batch, whose tasks and bytes are far below 2³².
fn small(n: usize) -> u32 {
    u32::try_from(n).expect("a batch is sent long before it holds 4 GiB")
}

/// Chunks as the columns of `insert_chunks.sql` and `enqueue_tasks.sql`.
#[derive(Debug, Default)]
pub struct ChunkColumns {
    /// Lanes.
    pub lanes: Vec<i32>,
    /// Runs in all of their tasks.
    pub max_attempts: Vec<i16>,
    /// Mean payloads.
    pub task_bytes: Vec<i32>,
    /// First ids.
    pub los: Vec<i64>,
    /// Last ids.
    pub his: Vec<i64>,
    /// When the first task of each expires; empty where none does.
    pub expiries: Vec<Option<SystemTime>>,
}

impl From<Vec<Chunk>> for ChunkColumns {
    fn from(chunks: Vec<Chunk>) -> Self {
        let expiries = expiries(chunks.iter().map(|c| c.expires_at));
        let mut columns = Self { expiries, ..Self::default() };
        for c in chunks {
            columns.lanes.push(c.lane);
            columns.max_attempts.push(c.max_attempts);
            columns.task_bytes.push(c.task_bytes);
            columns.los.push(c.lo);
            columns.his.push(c.hi);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(payloads: &[&[u8]]) -> Batch {
        let lane = LaneKey::new("default", "a", 0).unwrap();
        let mut batch = Batch::default();
        for payload in payloads {
            let at = batch.group(&lane, 3, false, false);
            batch
                .push(at, None, None, None, Format::Json, |out| {
                    out.extend_from_slice(payload);
                    Ok::<(), ()>(())
                })
                .unwrap();
        }
        batch
    }

    fn finish(batch: &Batch, ids: &[Option<i64>]) -> (Vec<u8>, Vec<Chunk>) {
        let (mut chunker, mut blocks) = (Chunker::new(), Blocks::new());
        batch.groups[0].finish(Home { lane: 7, leaf: 2 }, ids.iter().copied(), &mut chunker, &mut blocks);
        let all = blocks.finish().concat();
        let rows = all.strip_prefix(HEADER).unwrap().strip_suffix(TRAILER).unwrap();
        (rows.to_vec(), chunker.finish())
    }

    #[test]
    fn a_row_is_what_copy_expects() {
        let batch = batch(&[b"{}"]);
        let (rows, chunks) = finish(&batch, &[Some(513)]);
        let mut expected = vec![0, 6];
        for field in
            [&513i64.to_be_bytes()[..], &7i32.to_be_bytes(), &2i16.to_be_bytes(), &3i16.to_be_bytes(), b"j", b"{}"]
        {
            expected.extend(i32::try_from(field.len()).unwrap().to_be_bytes());
            expected.extend(field);
        }
        assert_eq!(rows, expected);
        assert_eq!(chunks, [Chunk { lane: 7, max_attempts: 3, task_bytes: 2, lo: 513, hi: 513, expires_at: None }]);
    }

    #[test]
    fn rows_without_an_id_are_left_out_and_cut_the_chunk() {
        let batch = batch(&[b"a", b"bcd", b"ef", b""]);
        let (rows, chunks) = finish(&batch, &[Some(1), None, Some(3), Some(4)]);
        let left: Vec<_> = Rows(&rows).map(RowView::payload).collect();
        assert_eq!(left, [&b"a"[..], b"ef", b""]);
        let runs: Vec<_> = chunks.iter().map(|c| (c.lo, c.hi, c.task_bytes)).collect();
        assert_eq!(runs, [(1, 1, 1), (3, 4, 1)]);
    }

    #[test]
    fn a_failed_payload_leaves_the_batch_as_it_was() {
        let mut batch = batch(&[b"a"]);
        let bytes = batch.bytes();
        let spoil = |out: &mut Vec<u8>| {
            out.push(1);
            Err("no")
        };
        assert_eq!(batch.push(0, None, None, Some(("t", TokenRule::default())), Format::Json, spoil), Err("no"));
        assert_eq!((batch.len, batch.bytes(), batch.groups[0].rows().count(), batch.tokens.len()), (1, bytes, 1, 0));
    }

    #[test]
    fn the_order_of_mixed_tasks_is_kept() {
        let lanes = [LaneKey::new("q", "a", 0).unwrap(), LaneKey::new("q", "b", 0).unwrap()];
        let mut batch = Batch::default();
        for n in [0, 0, 1, 0, 1] {
            let at = batch.group(&lanes[n], 3, false, false);
            batch.push(at, None, None, None, Format::Json, |_| Ok::<(), ()>(())).unwrap();
        }
        assert_eq!(batch.order, [0, 0, 1, 0, 1]);
        assert_eq!(batch.groups.iter().map(|g| g.len).collect::<Vec<_>>(), [3, 2]);
    }

    #[test]
    fn chunks_have_at_most_500_tasks_and_1_mib() {
        let mut chunker = Chunker::new();
        (1..=1_200).for_each(|id| chunker.push(id, 1, 3, 70, None));
        let sizes: Vec<_> = chunker.finish().iter().map(|c| c.hi - c.lo + 1).collect();
        assert_eq!(sizes, [500, 500, 200]);
        let mut chunker = Chunker::new();
        (1..=3).for_each(|id| chunker.push(id, 1, 3, 600 * 1024, None));
        assert_eq!(chunker.finish().len(), 3);
    }

    #[test]
    fn what_expires_shares_no_chunk_with_what_does_not_and_the_first_time_counts() {
        let mut chunker = Chunker::new();
        for (id, at) in [(1, None), (2, Some(70)), (3, Some(50)), (4, Some(60)), (5, None)] {
            chunker.push(id, 1, 3, 10, at);
        }
        let chunks: Vec<_> = chunker.finish().iter().map(|c| (c.lo, c.hi, c.expires_at)).collect();
        assert_eq!(chunks, [(1, 1, None), (2, 4, Some(50)), (5, 5, None)]);
    }
}
