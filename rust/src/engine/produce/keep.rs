//! The batches of an open transaction, kept so that it can be sent again from its start.
//!
//! A few are kept in memory. A load that takes tokens holds locks, so it may lose a deadlock at any time, and then must not fail: its
//! further batches go to a file, which has no name and ends with the transaction. Other loads are given up beyond what memory keeps.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

use tokio::task::spawn_blocking;

use crate::engine::connect::random_u64;
use crate::engine::produce::copy::{Batch, Group, TokenAt};
use crate::engine::produce::task::{LaneKey, OnConflict, Scope, TokenRule, When};

/// Bytes of batches kept in memory.
const MEMORY: usize = 16 * 1024 * 1024;

/// What is kept, from the transaction's first batch on.
#[derive(Debug, Default)]
pub(super) struct Kept {
    spool: Option<Arc<Spool>>,
    /// Where each batch lies in the file.
    spooled: Vec<(u64, usize)>,
    memory: Vec<Batch>,
    bytes: usize,
    has_tokens: bool,
    is_cut: bool,
}

impl Kept {
    /// Adds the next batch.
    pub(super) fn push(&mut self, batch: Batch) {
        self.bytes += batch.bytes();
        self.has_tokens |= !batch.tokens.is_empty();
        self.memory.push(batch);
    }

    /// How many there are; after a cut, only those that are not sent yet.
    pub(super) fn len(&self) -> usize {
        self.spooled.len() + self.memory.len()
    }

    /// Some were dropped: the transaction can't be sent again.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// A batch by its number; read back from the file, it is kept in `place` meanwhile.
    pub(super) async fn get<'a>(&'a self, n: usize, place: &'a mut Batch) -> io::Result<Option<&'a Batch>> {
        let Some(&(at, size)) = self.spooled.get(n) else { return Ok(self.memory.get(n - self.spooled.len())) };
        let Some(spool) = self.spool.clone() else { return Ok(None) };
        *place = spawn_blocking(move || spool.read(at, size)).await.map_err(io::Error::other)??;
        Ok(Some(place))
    }

    /// All were sent: makes room. True: they are still all kept; else none is, or an error says why none is.
    pub(super) async fn make_room(&mut self) -> io::Result<bool> {
        if self.is_cut || (self.bytes > MEMORY && !self.has_tokens) {
            self.cut();
            return Ok(false);
        }
        if self.bytes <= MEMORY {
            return Ok(true);
        }
        let batches = std::mem::take(&mut self.memory);
        self.bytes = 0;
        let spool = self.spool.take();
        let written = spawn_blocking(move || {
            let mut spool = match spool.map(Arc::try_unwrap) {
                Some(Ok(spool)) => spool,
                Some(Err(_)) => return Err(io::Error::other("a batch is being read")),
                None => Spool::new()?,
            };
            let places = batches.iter().map(|batch| spool.write(batch)).collect::<io::Result<Vec<_>>>()?;
            Ok((spool, places))
        });
        match written.await.map_err(io::Error::other).and_then(|written| written) {
            Ok((spool, places)) => {
                self.spool = Some(Arc::new(spool));
                self.spooled.extend(places);
                Ok(true)
            }
            Err(e) => {
                self.cut();
                Err(e)
            }
        }
    }

    fn cut(&mut self) {
        (self.spool, self.is_cut) = (None, true);
        self.spooled.clear();
        self.memory.clear();
    }
}

/// Batches in a file that nobody else can open.
#[derive(Debug)]
struct Spool {
    file: File,
    end: u64,
    lanes: Vec<Arc<LaneKey>>,
    numbers: HashMap<Arc<LaneKey>, u32>,
}

impl Spool {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("fastq-{:016x}", random_u64()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file, end: 0, lanes: Vec::new(), numbers: HashMap::new() })
    }

    fn write(&mut self, batch: &Batch) -> io::Result<(u64, usize)> {
        let mut out = Vec::with_capacity(batch.bytes() + batch.bytes() / 4);
        put(&mut out, batch.len);
        put(&mut out, batch.groups.len());
        for group in &batch.groups {
            let next = u32::try_from(self.lanes.len()).unwrap_or(u32::MAX);
            let number = *self.numbers.entry(Arc::clone(&group.lane)).or_insert_with(|| {
                self.lanes.push(Arc::clone(&group.lane));
                next
            });
            put(&mut out, number as usize);
            out.extend(group.max_attempts.to_le_bytes());
            out.push(u8::from(group.is_delayed));
            put(&mut out, group.len);
            for when in &group.whens {
                let (tag, bits) = match when {
                    When::After(seconds) => (0, seconds.to_bits()),
                    When::At(us) => (1, us.cast_unsigned()),
                };
                out.push(tag);
                out.extend(bits.to_le_bytes());
            }
            put(&mut out, group.expiries.len());
            group.expiries.iter().for_each(|us| out.extend(us.to_le_bytes()));
            put(&mut out, group.rows.len());
            out.extend(&group.rows);
        }
        put(&mut out, batch.order.len());
        batch.order.iter().for_each(|group| out.extend(group.to_le_bytes()));
        put(&mut out, batch.tokens.len());
        for t in &batch.tokens {
            for n in [t.task, t.group, t.start, t.end] {
                out.extend(n.to_le_bytes());
            }
            put_rule(&mut out, t.rule);
        }
        put(&mut out, batch.token_text.len());
        out.extend(batch.token_text.as_bytes());
        self.file.write_all_at(&out, self.end)?;
        let place = (self.end, out.len());
        self.end += out.len() as u64;
        Ok(place)
    }

    fn read(&self, at: u64, size: usize) -> io::Result<Batch> {
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, at)?;
        self.parse(&mut Reader(&bytes)).ok_or_else(|| io::Error::other("a spooled batch was changed"))
    }

    fn parse(&self, r: &mut Reader<'_>) -> Option<Batch> {
        let mut batch = Batch::default();
        batch.len = r.size()?;
        for _ in 0..r.size()? {
            let lane = Arc::clone(self.lanes.get(r.size()?)?);
            let max_attempts = i16::from_le_bytes(r.array()?);
            let is_delayed = r.array::<1>()? == [1];
            let len = r.size()?;
            let mut whens = Vec::new();
            for _ in 0..if is_delayed { len } else { 0 } {
                let [tag] = r.array()?;
                let bits = u64::from_le_bytes(r.array()?);
                whens.push(if tag == 0 { When::After(f64::from_bits(bits)) } else { When::At(bits.cast_signed()) });
            }
            let mut expiries = Vec::new();
            for _ in 0..r.size()? {
                expiries.push(i64::from_le_bytes(r.array()?));
            }
            let size = r.size()?;
            let rows = r.take(size)?.to_vec();
            batch.groups.push(Group { lane, max_attempts, is_delayed, whens, expiries, len, rows });
        }
        for _ in 0..r.size()? {
            batch.order.push(r.u32()?);
        }
        for _ in 0..r.size()? {
            batch.tokens.push(TokenAt {
                task: r.u32()?,
                group: r.u32()?,
                start: r.u32()?,
                end: r.u32()?,
                rule: r.rule()?,
            });
        }
        let size = r.size()?;
        String::from_utf8(r.take(size)?.to_vec()).ok()?.clone_into(&mut batch.token_text);
        Some(batch)
    }
}

/// A count, or a size: 32 bits, as everything within a batch.
fn put(out: &mut Vec<u8>, n: usize) {
    out.extend(u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes());
}

/// Three bytes and the time, -1 for none.
fn put_rule(out: &mut Vec<u8>, rule: TokenRule) {
    let conflict = match rule.on_conflict {
        OnConflict::Existing => 0,
        OnConflict::Raise => 1,
        OnConflict::Replace { payload, time } => 4 + 2 * u8::from(payload) + u8::from(time),
    };
    out.extend([rule.scope as u8, u8::from(rule.until_end), conflict]);
    out.extend(rule.ttl.unwrap_or(-1).to_le_bytes());
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn rule(&mut self) -> Option<TokenRule> {
        let [scope, until_end, conflict] = self.array()?;
        let ttl = i64::from_le_bytes(self.array()?);
        let on_conflict = match conflict {
            0 => OnConflict::Existing,
            1 => OnConflict::Raise,
            n => OnConflict::Replace { payload: n & 2 != 0, time: n & 1 != 0 },
        };
        let scope = [Scope::Type, Scope::Queue, Scope::Global].into_iter().find(|&s| s as u8 == scope)?;
        Some(TokenRule { scope, until_end: until_end == 1, ttl: (ttl >= 0).then_some(ttl), on_conflict })
    }

    fn size(&mut self) -> Option<usize> {
        self.u32().map(|n| n as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::produce::task::Format;

    fn batch(n: usize) -> Batch {
        let lanes = ["a", "b"].map(|kind| LaneKey::new("q", kind, 0).unwrap());
        let mut batch = Batch::default();
        for i in 0..n {
            let when = match i % 3 {
                0 => None,
                1 => Some(When::After(1.5)),
                _ => Some(When::At(-7)),
            };
            let expires_at = (i % 5 == 0).then_some(-3);
            let at = batch.group(&lanes[i % 2], 3, when.is_some(), expires_at.is_some());
            let token = (i % 4 == 0).then(|| format!("ü{i}"));
            let rule = match i % 3 {
                0 => TokenRule::default(),
                1 => TokenRule { scope: Scope::Global, on_conflict: OnConflict::Raise, ..TokenRule::default() },
                _ => TokenRule {
                    scope: Scope::Queue,
                    until_end: true,
                    ttl: Some(7),
                    on_conflict: OnConflict::Replace { payload: false, time: true },
                },
            };
            let encode = |out: &mut Vec<u8>| {
                out.extend(i.to_string().as_bytes());
                Ok::<(), ()>(())
            };
            batch
                .push(at, when, expires_at, token.as_deref().map(|token| (token, rule)), Format::Json, encode)
                .unwrap();
        }
        batch
    }

    #[test]
    fn a_spooled_batch_comes_back_as_it_was() {
        let mut spool = Spool::new().unwrap();
        let places: Vec<_> = [5, 40].map(|n| spool.write(&batch(n)).unwrap()).to_vec();
        for (n, (at, size)) in [5, 40].into_iter().zip(places) {
            let (back, was) = (spool.read(at, size).unwrap(), batch(n));
            assert_eq!((back.len, &back.order), (was.len, &was.order));
            let tokens =
                |b: &Batch| b.tokens.iter().map(|t| (t.task, t.rule, b.token(t).1.to_owned())).collect::<Vec<_>>();
            assert_eq!(tokens(&back), tokens(&was));
            let tasks = |b: Batch| b.into_tasks().iter().map(|t| format!("{t:?}")).collect::<Vec<_>>();
            assert_eq!(tasks(back), tasks(was));
        }
    }
}
