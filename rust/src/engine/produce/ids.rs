//! Ids: reserved in blocks, handed out in runs, and the compact answer of a large enqueue.

use std::collections::VecDeque;

/// Ids that a reserved block holds: the increment of the sequence `task_id`.
pub const BLOCK: i64 = 1_000;
/// Runs shorter than this are kept as single ids: 8 bytes each, where a run costs 40.
const SHORT_RUN: u64 = 8;
/// Single ids kept in one piece, so that growing never copies more.
const PIECE: usize = 8_192;

/// Ids `lo..=hi`.
pub type Run = (i64, i64);

/// Reserved ids that no task has yet.
#[derive(Debug, Default)]
pub struct Stock {
    runs: VecDeque<Run>,
    left: i64,
}

impl Stock {
    /// Adds the block that starts at `lo`; blocks that touch become one run.
    pub fn add_block(&mut self, lo: i64) {
        let hi = lo + BLOCK - 1;
        self.left += BLOCK;
        match self.runs.back_mut() {
            Some(last) if last.1 + 1 == lo => last.1 = hi,
            _ => self.runs.push_back((lo, hi)),
        }
    }

    /// How many are left.
    pub fn left(&self) -> usize {
        usize::try_from(self.left).unwrap_or(0)
    }

    /// Takes `n` ids as runs; None when there are fewer.
    pub fn take(&mut self, n: usize) -> Option<Vec<Run>> {
        let mut wanted = i64::try_from(n).ok().filter(|&n| n <= self.left)?;
        self.left -= wanted;
        let mut taken = Vec::with_capacity(1);
        while wanted > 0 {
            let first = self.runs.front_mut()?;
            let size = (first.1 - first.0 + 1).min(wanted);
            taken.push((first.0, first.0 + size - 1));
            first.0 += size;
            wanted -= size;
            if first.0 > first.1 {
                self.runs.pop_front();
            }
        }
        Some(taken)
    }

    /// Forgets all: after a reconnect the sequence may have gone back with a crashed server.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Hands out runs id by id, or piece by piece.
#[derive(Debug, Clone)]
pub struct RunIter {
    runs: std::vec::IntoIter<Run>,
    now: Run,
}

impl RunIter {
    /// Over these runs in their order.
    pub fn new(runs: Vec<Run>) -> Self {
        Self { runs: runs.into_iter(), now: (0, -1) }
    }

    /// The next `n` ids as runs (fewer when they run out).
    pub fn split(&mut self, n: usize) -> Vec<Run> {
        let mut wanted = i64::try_from(n).unwrap_or(i64::MAX);
        let mut out = Vec::with_capacity(1);
        while wanted > 0 {
            if self.now.0 > self.now.1 {
                match self.runs.next() {
                    Some(run) => self.now = run,
                    None => break,
                }
                continue;
            }
            let size = (self.now.1 - self.now.0 + 1).min(wanted);
            out.push((self.now.0, self.now.0 + size - 1));
            self.now.0 += size;
            wanted -= size;
        }
        out
    }
}

impl Iterator for RunIter {
    type Item = i64;

    fn next(&mut self) -> Option<i64> {
        while self.now.0 > self.now.1 {
            self.now = self.runs.next()?;
        }
        self.now.0 += 1;
        Some(self.now.0 - 1)
    }
}

#[derive(Debug)]
enum Part {
    /// New tasks with ids from here on, one after the other.
    Run(i64),
    /// Ids one by one; negative: a duplicate's, of the task that holds the token.
    List(Vec<i64>),
}

/// What an enqueue answers, in input order: at most 16 bytes a task, and next to nothing for runs.
#[derive(Debug, Default)]
pub struct EnqueuedIds {
    /// The index of each part's first task, and the part.
    parts: Vec<(u64, Part)>,
    len: u64,
}

impl EnqueuedIds {
    /// Appends new tasks with the ids `lo..=hi`.
    pub fn push_run(&mut self, (lo, hi): Run) {
        let size = hi.abs_diff(lo) + 1;
        if let Some((start, Part::Run(first))) = self.parts.last()
            && first.checked_add_unsigned(self.len - start) == Some(lo)
        {
            self.len += size;
            return;
        }
        if size < SHORT_RUN {
            (lo..=hi).for_each(|id| self.push(id, true));
        } else {
            self.parts.push((self.len, Part::Run(lo)));
            self.len += size;
        }
    }

    /// Appends one task.
    pub fn push(&mut self, id: i64, is_new: bool) {
        let value = if is_new { id } else { -id };
        match self.parts.last_mut() {
            Some((_, Part::List(list))) if list.len() < PIECE => list.push(value),
            Some((start, Part::Run(first))) if is_new && first.checked_add_unsigned(self.len - *start) == Some(id) => {}
            _ => self.parts.push((self.len, Part::List(vec![value]))),
        }
        self.len += 1;
    }

    /// Forgets all tasks from index `len` on: their transaction was rolled back.
    pub fn truncate(&mut self, len: u64) {
        while let Some((start, part)) = self.parts.last_mut() {
            if *start < len {
                if let Part::List(list) = part {
                    list.truncate(usize::try_from(len - *start).unwrap_or(usize::MAX));
                }
                break;
            }
            self.parts.pop();
        }
        self.len = self.len.min(len);
    }

    /// How many tasks.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The id of task `index`, and whether it is new.
    pub fn get(&self, index: u64) -> Option<(i64, bool)> {
        if index >= self.len {
            return None;
        }
        let at = self.parts.partition_point(|part| part.0 <= index).checked_sub(1)?;
        let (start, part) = self.parts.get(at)?;
        let offset = index - start;
        match part {
            Part::Run(first) => Some((first.checked_add_unsigned(offset)?, true)),
            Part::List(list) => list.get(usize::try_from(offset).ok()?).map(|&id| (id.abs(), id > 0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_touch_are_one_run() {
        let mut stock = Stock::default();
        for lo in [1, 1_001, 5_001] {
            stock.add_block(lo);
        }
        assert_eq!(stock.take(1_500).unwrap(), [(1, 1_500)]);
        assert_eq!(stock.take(501).unwrap(), [(1_501, 2_000), (5_001, 5_001)]);
        assert_eq!(stock.left(), 999);
        assert!(stock.take(1_000).is_none());
        assert_eq!(stock.left(), 999);
    }

    #[test]
    fn runs_are_handed_out_in_order() {
        let mut ids = RunIter::new(vec![(1, 3), (10, 12)]);
        assert_eq!(ids.next(), Some(1));
        assert_eq!(ids.split(4), [(2, 3), (10, 11)]);
        assert_eq!(ids.next(), Some(12));
        assert_eq!(ids.next(), None);
        assert!(ids.split(1).is_empty());
    }

    #[test]
    fn answers_come_back_in_input_order() {
        let mut ids = EnqueuedIds::default();
        let mut expected = Vec::new();
        ids.push_run((1, 1_000));
        ids.push_run((1_001, 1_500));
        expected.extend((1..=1_500).map(|id| (id, true)));
        ids.push(7, false);
        expected.push((7, false));
        ids.push_run((2_000, 2_002));
        expected.extend((2_000..=2_002).map(|id| (id, true)));
        for id in (3_000..50_000).step_by(3) {
            ids.push(id, true);
            expected.push((id, true));
        }
        ids.push_run((60_000, 60_100));
        expected.extend((60_000..=60_100).map(|id| (id, true)));
        ids.push(60_101, true);
        expected.push((60_101, true));
        assert_eq!(ids.len(), expected.len() as u64);
        for (index, want) in expected.iter().enumerate() {
            assert_eq!(ids.get(index as u64), Some(*want), "{index}");
        }
        assert_eq!(ids.get(ids.len()), None);
    }

    #[test]
    fn what_was_rolled_back_is_forgotten() {
        let mut ids = EnqueuedIds::default();
        ids.push_run((1, 20));
        ids.push(30, false);
        ids.push(31, true);
        ids.truncate(21);
        assert_eq!((ids.len(), ids.get(20), ids.get(21)), (21, Some((30, false)), None));
        ids.truncate(10);
        ids.push_run((50, 59));
        assert_eq!(
            (ids.len(), ids.get(9), ids.get(10), ids.get(19)),
            (20, Some((10, true)), Some((50, true)), Some((59, true)))
        );
        ids.truncate(0);
        assert!(ids.is_empty() && ids.get(0).is_none());
    }

    #[test]
    fn adjoining_runs_cost_one_part() {
        let mut ids = EnqueuedIds::default();
        for lo in (0..5_000_000).step_by(10_000) {
            ids.push_run((lo + 1, lo + 10_000));
        }
        assert_eq!(ids.parts.len(), 1);
        assert_eq!(ids.len(), 5_000_000);
    }
}
