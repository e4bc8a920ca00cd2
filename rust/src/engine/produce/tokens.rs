//! Idempotency tokens: taken in one order everywhere, in the transaction that writes their tasks.
//!
//! Two transactions that take the same tokens in different orders deadlock; so every statement takes them sorted by type and token, as
//! bytes (the table's collation is "C"), and names each once.

use std::collections::HashSet;

use tokio_postgres::Row;

use crate::engine::connect::Link;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::shared::{Param, Shared, Stats};

/// A token can be freed between the insert that met it and the question who holds it, but hardly this often.
const ROUNDS: usize = 20;

/// A token that a task would have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    /// The task's type.
    pub(super) kind: &'a str,
    /// The token.
    pub(super) token: &'a str,
    /// The task's position in its flight or batch.
    pub(super) task: usize,
}

impl<'a> Wanted<'a> {
    fn key(&self) -> (&'a [u8], &'a [u8]) {
        (self.kind.as_bytes(), self.token.as_bytes())
    }
}

/// Sorts them; the first task in input order keeps a token, the others come back as (task, the task that has its token).
pub(super) fn sort(wanted: &mut Vec<Wanted<'_>>) -> Vec<(usize, usize)> {
    wanted.sort_unstable_by(|a, b| a.key().cmp(&b.key()).then(a.task.cmp(&b.task)));
    let mut twins = Vec::new();
    wanted.dedup_by(|next, first| {
        let is_twin = next.key() == first.key();
        if is_twin {
            twins.push((next.task, first.task));
        }
        is_twin
    });
    twins
}

/// Takes tokens, sorted, in the transaction that is open on `link`, or is opened by `begin` (sent ahead in the same flight). `id` gives
/// a task's id. Answers, for each token that somebody else holds: its place in `wanted`, and the holder's id.
pub(super) async fn take(
    shared: &Shared,
    link: &Link,
    begin: Option<&str>,
    wanted: &[Wanted<'_>],
    id: impl Fn(usize) -> i64,
) -> Result<Vec<(usize, i64)>> {
    link.prepare("insert_tokens").await?;
    link.prepare("find_tokens").await?;
    let mut held = Vec::new();
    let mut open: Vec<usize> = (0..wanted.len()).collect();
    let mut begin = begin;
    for _ in 0..ROUNDS {
        let kinds: Vec<_> = open.iter().map(|&n| wanted[n].kind).collect();
        let tokens: Vec<_> = open.iter().map(|&n| wanted[n].token).collect();
        let ids: Vec<_> = open.iter().map(|&n| id(wanted[n].task)).collect();
        Stats::add(&shared.stats.statements, 1 + usize::from(begin.is_some()));
        let params: [Param<'_>; 3] = [&kinds, &tokens, &ids];
        let insert = link.query("insert_tokens", &params);
        let rows = match begin.take() {
            Some(begin) => {
                let (opened, rows) = tokio::join!(link.batch(begin), insert);
                opened?;
                rows?
            }
            None => insert.await?,
        };
        if rows.len() == open.len() {
            return Ok(held);
        }
        let taken: HashSet<i64> = rows.iter().map(|row| row.try_get(0)).collect::<std::result::Result<_, _>>()?;
        open = open.into_iter().zip(ids).filter(|(_, id)| !taken.contains(id)).map(|(n, _)| n).collect();
        Stats::add(&shared.stats.statements, 1);
        let found = find(link, wanted, &open).await?;
        open.retain(|n| !found.iter().any(|f| f.0 == *n));
        held.extend(found);
        if open.is_empty() {
            return Ok(held);
        }
    }
    let kind = Kind::Database { sqlstate: String::new(), transient: true };
    Err(Error::new(kind, "idempotency tokens were taken and freed by others faster than they could be read"))
}

/// Who holds which of these tokens (places in `wanted`).
pub(super) async fn find(link: &Link, wanted: &[Wanted<'_>], places: &[usize]) -> Result<Vec<(usize, i64)>> {
    let kinds: Vec<_> = places.iter().map(|&n| wanted[n].kind).collect();
    let tokens: Vec<_> = places.iter().map(|&n| wanted[n].token).collect();
    let rows = link.query("find_tokens", &[&kinds, &tokens]).await?;
    let read = |row: &Row| {
        let n = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
        let place = n.checked_sub(1).and_then(|n| places.get(n)).copied();
        let place = place.ok_or_else(|| Error::lost("an answer to another question"))?;
        Ok((place, row.try_get(1)?))
    };
    rows.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_sorted_as_bytes_and_named_once() {
        let want = |kind, token, task| Wanted { kind, token, task };
        let mut wanted =
            vec![want("b", "x", 0), want("a", "é", 1), want("a", "z", 2), want("b", "x", 3), want("a", "Z", 4)];
        let twins = sort(&mut wanted);
        let keys: Vec<_> = wanted.iter().map(|w| (w.kind, w.token, w.task)).collect();
        assert_eq!(keys, [("a", "Z", 4), ("a", "z", 2), ("a", "é", 1), ("b", "x", 0)]);
        assert_eq!(twins, [(3, 0)]);
    }
}
