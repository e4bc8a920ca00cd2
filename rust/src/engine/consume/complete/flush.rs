//! What one flight of the completer stores: outcomes of one registration, sorted by the statement that each belongs to.

use std::collections::{BTreeMap, HashMap};

use crate::engine::consume::outcomes::Ended;
use crate::engine::consume::task::{Failure, Holder, Outcome, Returned};
use crate::engine::wire::IdSet;

/// A look-up by `lo` finds a row of `done` whose ids span less than this.
const SPAN: i64 = 1_024;
/// Bytes of results after which a flush takes nothing more: a statement of hundreds of megabytes would hold up all that comes behind it.
const BYTES: usize = 4 << 20;

/// Outcomes of one registration of this consumer, by statement.
#[derive(Debug, Default)]
pub(super) struct Flush {
    /// By claim: ids and their run times.
    pub(super) completed: BTreeMap<i64, Vec<(i64, u32)>>,
    /// The same, with what the handlers returned.
    pub(super) returned: BTreeMap<i64, Vec<(i64, u32, Box<Returned>)>>,
    pub(super) failed: Vec<(i64, i64, Failure, u32)>,
    /// Claim, id and seconds.
    pub(super) snoozed: Vec<(i64, i64, f64)>,
    /// Claim and id.
    pub(super) expired: Vec<(i64, i64)>,
    pub(super) given_back: BTreeMap<i64, Vec<i64>>,
    pub(super) count: usize,
    pub(super) bytes: usize,
    /// It was sent before and no answer came: what is refused now may have been stored then.
    pub(super) in_doubt: bool,
}

/// What a refused outcome was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Completed,
    Failed,
    Snoozed,
    Expired,
    GivenBack,
}

/// Completed tasks by claim, as statements take them: all ids of each claim, and pieces of them that a look-up by `lo` finds.
#[derive(Debug, Default)]
pub(super) struct Sets {
    pub(super) nos: Vec<i64>,
    pub(super) ids: Vec<IdSet>,
    pub(super) piece_nos: Vec<i64>,
    pub(super) pieces: Vec<IdSet>,
    pub(super) times: Vec<i64>,
}

impl Sets {
    /// Adds the tasks of one claim: ids and run times.
    pub(super) fn add(&mut self, no: i64, members: &[(i64, u32)]) {
        let mut ids: Vec<i64> = members.iter().map(|m| m.0).collect();
        let set = IdSet::from_ids(&mut ids);
        for piece in set.pieces(SPAN) {
            self.times.push(members.iter().filter(|m| piece.contains(m.0)).map(|m| i64::from(m.1)).sum::<i64>());
            self.piece_nos.push(no);
            self.pieces.push(piece);
        }
        self.nos.push(no);
        self.ids.push(set);
    }
}

impl Flush {
    pub(super) fn add(&mut self, ended: Ended) {
        let (no, id) = (ended.holder.no, ended.holder.id);
        self.count += usize::from(!matches!(ended.outcome, Outcome::Dropped));
        self.bytes += ended.bytes();
        match ended.outcome {
            Outcome::Completed => self.completed.entry(no).or_default().push((id, ended.took_us)),
            Outcome::Returned(value) => self.returned.entry(no).or_default().push((id, ended.took_us, value)),
            Outcome::Failed(failure) => self.failed.push((no, id, *failure, ended.took_us)),
            Outcome::Snoozed(delay) => self.snoozed.push((no, id, delay)),
            Outcome::Expired => self.expired.push((no, id)),
            Outcome::GivenBack => self.given_back.entry(no).or_default().push(id),
            Outcome::Dropped => {}
        }
    }

    /// Claim, id and run time of the only member, where that is a completion, and not one that may have been stored before.
    pub(super) fn single(&self) -> Option<(i64, i64, i64)> {
        let (no, members) = self.completed.first_key_value()?;
        let &(id, took_us) = members.first()?;
        (self.count == 1 && !self.in_doubt).then_some((*no, id, i64::from(took_us)))
    }

    /// Whether it holds results enough for one statement.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= BYTES
    }

    /// Two flushes of half the members each, for finding the one that a statement fails for.
    pub(super) fn split(self) -> (Flush, Flush) {
        let half = self.count / 2;
        let like = || Flush { in_doubt: self.in_doubt, ..Flush::default() };
        let mut halves = (like(), like());
        for (i, ended) in self.into_members().enumerate() {
            if i < half { halves.0.add(ended) } else { halves.1.add(ended) }
        }
        halves
    }

    pub(super) fn into_members(self) -> impl Iterator<Item = Ended> {
        let ended = |no, id, took_us, outcome| Ended { holder: Holder { epoch: 0, no, id }, took_us, outcome };
        let completed = self.completed.into_iter().flat_map(|(no, ids)| ids.into_iter().map(move |m| (no, m)));
        let completed = completed.map(move |(no, (id, took))| ended(no, id, took, Outcome::Completed));
        let returned = self.returned.into_iter().flat_map(|(no, ids)| ids.into_iter().map(move |m| (no, m)));
        let returned = returned.map(move |(no, (id, took, value))| ended(no, id, took, Outcome::Returned(value)));
        let failed = self.failed.into_iter();
        let failed = failed.map(move |(no, id, f, took)| ended(no, id, took, Outcome::Failed(Box::new(f))));
        let snoozed = self.snoozed.into_iter();
        let snoozed = snoozed.map(move |(no, id, delay)| ended(no, id, 0, Outcome::Snoozed(delay)));
        let expired = self.expired.into_iter().map(move |(no, id)| ended(no, id, 0, Outcome::Expired));
        let back = self.given_back.into_iter().flat_map(|(no, ids)| ids.into_iter().map(move |id| (no, id)));
        let back = back.map(move |(no, id)| ended(no, id, 0, Outcome::GivenBack));
        completed.chain(returned).chain(failed).chain(snoozed).chain(expired).chain(back)
    }

    /// Members by claim, for the books.
    pub(super) fn by_claim(&self) -> HashMap<i64, u64> {
        let mut counts: HashMap<i64, u64> = HashMap::new();
        for (no, ids) in &self.completed {
            *counts.entry(*no).or_default() += ids.len() as u64;
        }
        for (no, ids) in &self.returned {
            *counts.entry(*no).or_default() += ids.len() as u64;
        }
        for (no, ids) in &self.given_back {
            *counts.entry(*no).or_default() += ids.len() as u64;
        }
        let put_off = self.snoozed.iter().map(|s| s.0);
        for no in self.failed.iter().map(|f| f.0).chain(put_off).chain(self.expired.iter().map(|e| e.0)) {
            *counts.entry(no).or_default() += 1;
        }
        counts
    }

    /// Tasks that completed, with a result or without.
    pub(super) fn completions(&self) -> usize {
        self.completed.values().map(Vec::len).sum::<usize>() + self.returned.values().map(Vec::len).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(id: i64, outcome: Outcome) -> Ended {
        Ended { holder: Holder { epoch: 0, no: id % 2, id }, took_us: 1, outcome }
    }

    fn result(bytes: usize) -> Outcome {
        Outcome::Returned(Box::new(Returned { seconds: 60.0, is_json: true, value: vec![b'1'; bytes] }))
    }

    fn mixed() -> Flush {
        let mut flush = Flush { in_doubt: true, ..Flush::default() };
        let failure = Failure { delay: None, error: "x".into(), traceback: String::new() };
        flush.add(ended(1, Outcome::Completed));
        flush.add(ended(2, result(3)));
        flush.add(ended(3, result(4)));
        flush.add(ended(4, Outcome::Failed(Box::new(failure))));
        flush.add(ended(5, Outcome::Snoozed(1.0)));
        flush.add(ended(6, Outcome::GivenBack));
        flush.add(ended(7, Outcome::Expired));
        flush
    }

    #[test]
    fn members_come_out_as_they_went_in() {
        let flush = mixed();
        assert_eq!((flush.count, flush.completions()), (7, 3));
        assert_eq!(flush.by_claim(), HashMap::from([(0, 3), (1, 4)]));
        let mut members: Vec<Ended> = flush.into_members().collect();
        members.sort_by_key(|m| m.holder.id);
        assert_eq!(members.iter().map(|m| m.holder.id).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(members.iter().map(Ended::bytes).collect::<Vec<_>>(), [0, 3, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn a_completion_by_itself_is_told() {
        let mut flush = Flush::default();
        assert_eq!(flush.single(), None);
        flush.add(ended(3, Outcome::Completed));
        assert_eq!(flush.single(), Some((1, 3, 1)));
        flush.in_doubt = true;
        assert_eq!(flush.single(), None);
        flush.in_doubt = false;
        flush.add(ended(4, Outcome::Expired));
        assert_eq!(flush.single(), None);
        assert_eq!(mixed().single(), None);
    }

    #[test]
    fn a_split_loses_nothing() {
        let (a, b) = mixed().split();
        assert_eq!((a.count, b.count), (3, 4));
        assert!(a.in_doubt && b.in_doubt);
        let mut ids: Vec<i64> = a.into_members().chain(b.into_members()).map(|m| m.holder.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn large_results_fill_a_flush() {
        let mut flush = Flush::default();
        for id in 0..1_000 {
            flush.add(ended(id, Outcome::Completed));
        }
        flush.add(ended(1_000, result(BYTES - 1)));
        assert!(!flush.is_full());
        flush.add(ended(1_001, result(1)));
        assert!(flush.is_full());
    }
}
