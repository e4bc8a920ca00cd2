//! PostgreSQL's binary formats that tokio-postgres does not bring: sets of ids as `int8multirange`, and arrays read without copies.

use std::error::Error as StdError;

use bytes::{BufMut, BytesMut};
use postgres_types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

type Boxed = Box<dyn StdError + Sync + Send>;

/// A set of task ids as sorted runs, both ends included: PostgreSQL's `int8multirange`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdSet {
    runs: Vec<(i64, i64)>,
}

impl IdSet {
    /// A set of these ids; sorts them.
    pub fn from_ids(ids: &mut [i64]) -> Self {
        ids.sort_unstable();
        let mut set = Self::default();
        for &id in ids.iter() {
            set.push_run(id, id);
        }
        set
    }

    /// Appends `lo..=hi`, which must not lie before what is there.
    pub fn push_run(&mut self, lo: i64, hi: i64) {
        match self.runs.last_mut() {
            Some(last) if lo <= last.1 + 1 => last.1 = last.1.max(hi),
            _ => self.runs.push((lo, hi)),
        }
    }

    /// Cuts the set into pieces that each span less than `span` ids.
    pub fn pieces(&self, span: i64) -> Vec<IdSet> {
        let mut pieces: Vec<IdSet> = Vec::new();
        for &(mut lo, hi) in &self.runs {
            while lo <= hi {
                let start = pieces.last().and_then(|p| p.runs.first()).map(|r| r.0);
                let piece = match start {
                    Some(start) if lo - start < span => pieces.last_mut(),
                    _ => {
                        pieces.push(IdSet::default());
                        pieces.last_mut()
                    }
                }
                .expect("one was pushed if there was none");
                let start = piece.runs.first().map_or(lo, |r| r.0);
                let end = hi.min(start + span - 1);
                piece.push_run(lo, end);
                lo = end + 1;
            }
        }
        pieces
    }

    /// The runs, lowest first, both ends included.
    pub fn runs(&self) -> &[(i64, i64)] {
        &self.runs
    }

    /// Whether no id is in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many ids are in it.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|&(lo, hi)| hi.abs_diff(lo) + 1).sum()
    }

    /// The ids, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = i64> + '_ {
        self.runs.iter().flat_map(|&(lo, hi)| lo..=hi)
    }

    /// Whether `id` is in it.
    pub fn contains(&self, id: i64) -> bool {
        let at = self.runs.partition_point(|r| r.1 < id);
        self.runs.get(at).is_some_and(|r| r.0 <= id)
    }
}

// Flags of a range in its binary form (rangetypes.h): bounds that are there, included or endless.
const RANGE_LB_INC: u8 = 0x02;
const RANGE_UB_INC: u8 = 0x04;

impl ToSql for IdSet {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Boxed> {
        out.put_i32(i32::try_from(self.runs.len())?);
        for &(lo, hi) in &self.runs {
            out.put_i32(1 + 4 + 8 + 4 + 8);
            out.put_u8(RANGE_LB_INC | RANGE_UB_INC);
            out.put_i32(8);
            out.put_i64(lo);
            out.put_i32(8);
            out.put_i64(hi);
        }
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::INT8MULTI_RANGE
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for IdSet {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Boxed> {
        let mut r = Reader(raw);
        let mut set = IdSet::default();
        for _ in 0..r.i32()? {
            let _size = r.i32()?;
            let flags = r.take(1)?[0];
            // int8 ranges are canonical: [lo, hi), never empty inside a multirange, never endless here.
            if flags & !(RANGE_LB_INC | RANGE_UB_INC) != 0 {
                return Err("an endless or empty range of ids".into());
            }
            let _size = r.i32()?;
            let mut lo = r.i64()?;
            let _size = r.i32()?;
            let mut hi = r.i64()?;
            lo += i64::from(flags & RANGE_LB_INC == 0);
            hi -= i64::from(flags & RANGE_UB_INC == 0);
            set.push_run(lo, hi);
        }
        Ok(set)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::INT8MULTI_RANGE
    }
}

/// A cursor over big-endian bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Boxed> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("a value ends too early")?;
        self.0 = rest;
        Ok(head)
    }

    fn i32(&mut self) -> Result<i32, Boxed> {
        Ok(i32::from_be_bytes(self.take(4)?.try_into()?))
    }

    fn i64(&mut self) -> Result<i64, Boxed> {
        Ok(i64::from_be_bytes(self.take(8)?.try_into()?))
    }
}

/// A one-dimensional array without NULLs as it lies in the answer: its elements' bytes, not copied.
#[derive(Debug)]
pub struct Elements<'a> {
    raw: &'a [u8],
    left: usize,
}

impl<'a> FromSql<'a> for Elements<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Boxed> {
        let mut r = Reader(raw);
        let dimensions = r.i32()?;
        let _has_nulls = r.i32()?;
        let _element = r.i32()?;
        if dimensions == 0 {
            return Ok(Self { raw: &[], left: 0 });
        }
        let left = usize::try_from(r.i32()?)?;
        let _lower_bound = r.i32()?;
        Ok(Self { raw: r.0, left })
    }

    fn accepts(ty: &Type) -> bool {
        matches!(ty.kind(), postgres_types::Kind::Array(_))
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let (size, rest) = self.raw.split_at_checked(4)?;
        // -1 is NULL, which none of our arrays hold; an empty element stands in for it.
        let size = usize::try_from(i32::from_be_bytes(size.try_into().ok()?)).unwrap_or(0);
        let (element, rest) = rest.split_at_checked(size)?;
        self.raw = rest;
        Some(element)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elements<'_> {}

/// An element of an `int8` or `timestamptz` array.
pub fn i64_of(element: &[u8]) -> i64 {
    element.try_into().map_or(0, i64::from_be_bytes)
}

/// PostgreSQL counts timestamps from 2000-01-01; this many microseconds after the Unix epoch.
pub const EPOCH_2000_US: i64 = 946_684_800_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_run() {
        let set = IdSet::from_ids(&mut [5, 1, 2, 3, 9, 4, 11]);
        assert_eq!(set.runs(), [(1, 5), (9, 9), (11, 11)]);
        assert_eq!(set.len(), 7);
        assert!(set.contains(9) && !set.contains(10) && !set.contains(12));
    }

    #[test]
    fn a_set_survives_the_wire() {
        let set = IdSet::from_ids(&mut [1, 2, 7]);
        let mut out = BytesMut::new();
        set.to_sql(&Type::INT8MULTI_RANGE, &mut out).unwrap();
        assert_eq!(IdSet::from_sql(&Type::INT8MULTI_RANGE, &out).unwrap(), set);
    }

    #[test]
    fn pieces_span_less_than_asked_and_hold_every_id() {
        let mut set = IdSet::default();
        set.push_run(1, 3000);
        set.push_run(3500, 3501);
        set.push_run(10_000, 10_000);
        let pieces = set.pieces(1024);
        assert!(pieces.iter().all(|p| p.runs().last().unwrap().1 - p.runs()[0].0 < 1024));
        let ids: Vec<i64> = pieces.iter().flat_map(IdSet::iter).collect();
        assert_eq!(ids, set.iter().collect::<Vec<_>>());
    }
}
