//! Idempotency tokens: taken in one order everywhere, in the transaction that writes their tasks.
//!
//! Two transactions that take the same tokens in different orders deadlock; so every statement takes them sorted by type and token, as
//! bytes (the table's collation is "C"), and names each once. One that may be free by now (its time is over, or its task has ended) is
//! locked where it is met, and then looked at once more: so of two that want it one takes it over.

use std::collections::HashSet;

use tokio_postgres::Row;

use crate::engine::connect::Link;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::shared::{Param, Shared, Stats};
use crate::engine::produce::task::TokenRule;
use crate::engine::produce::texts::{self, Params, add, add_or_null, bytes, close};

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
    /// How it is meant.
    pub(super) rule: TokenRule,
    /// Some task that wants it would change its holder: it is locked, too.
    pub(super) locks: bool,
}

/// A token that somebody has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// Its place in what was asked.
    pub(super) place: usize,
    /// Who has it.
    pub(super) id: i64,
    /// It may be free by now.
    pub(super) may_go: bool,
}

impl<'a> Wanted<'a> {
    pub(super) fn new(kind: &'a str, token: &'a str, task: usize, rule: TokenRule) -> Self {
        Self { kind, token, task, rule, locks: rule.replaces() }
    }

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
            first.locks |= next.locks;
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
        let insert = async {
            if open.iter().any(|&n| wanted[n].rule.is_lent()) {
                let lent = open.iter().map(|&n| (&wanted[n], id(wanted[n].task)));
                let answer = texts::ask(link, "take_tokens", lent_params(lent)).await?;
                return Ok(answer.into_iter().flatten().collect());
            }
            let params: [Param<'_>; 3] = [&kinds, &tokens, &ids];
            let rows = link.query("insert_tokens", &params).await?;
            Ok::<HashSet<i64>, Error>(rows.iter().map(|row| row.try_get(0)).collect::<std::result::Result<_, _>>()?)
        };
        let taken = match begin.take() {
            Some(begin) => {
                let (opened, taken) = tokio::join!(link.batch(begin), insert);
                opened?;
                taken?
            }
            None => insert.await?,
        };
        if taken.len() == open.len() {
            return Ok(held);
        }
        open = open.into_iter().zip(ids).filter(|(_, id)| !taken.contains(id)).map(|(n, _)| n).collect();
        Stats::add(&shared.stats.statements, 1);
        let found = find(link, wanted, &open).await?;
        // With our own id, a first try that was thought lost is in: nothing of it may be taken over.
        let is_settled = |h: &Held| id(wanted[h.place].task) == h.id || !(h.may_go || wanted[h.place].locks);
        let (settled, loose): (Vec<_>, Vec<_>) = found.into_iter().partition(is_settled);
        let mut known: HashSet<usize> = settled.iter().map(|h| h.place).collect();
        held.extend(settled.iter().map(|h| (h.place, h.id)));
        if !loose.is_empty() {
            Stats::add(&shared.stats.statements, 2);
            let asked: Vec<_> = loose.iter().map(|h| h.place).collect();
            let lent = || asked.iter().map(|&n| (&wanted[n], id(wanted[n].task)));
            texts::ask(link, "hold_tokens", key_params(lent().map(|(w, _)| w))).await?;
            let answer = texts::ask(link, "take_over_tokens", lent_params(lent())).await?;
            for (place, holder) in holders(&answer, &asked)? {
                known.insert(place);
                if holder != 0 {
                    held.push((place, holder));
                }
            }
        }
        open.retain(|n| !known.contains(n));
        if open.is_empty() {
            return Ok(held);
        }
    }
    let kind = Kind::Database { sqlstate: String::new(), transient: true };
    Err(Error::new(kind, "idempotency tokens were taken and freed by others faster than they could be read"))
}

/// The parameters of `hold_tokens.sql`.
pub(super) fn key_params<'a>(wanted: impl Iterator<Item = &'a Wanted<'a>> + Clone) -> Params {
    vec![bytes(wanted.clone().map(|w| w.kind.as_bytes())), bytes(wanted.map(|w| w.token.as_bytes()))]
}

/// The parameters of `take_tokens.sql` and `take_over_tokens.sql`: tokens, each with the id of the task that wants it.
pub(super) fn lent_params<'a>(wanted: impl Iterator<Item = (&'a Wanted<'a>, i64)> + Clone) -> Params {
    let mut params = key_params(wanted.clone().map(|(w, _)| w));
    let mut texts = [const { String::new() }; 3];
    for (w, id) in wanted {
        add(&mut texts[0], id);
        add_or_null(&mut texts[1], w.rule.ttl);
        add_or_null(&mut texts[2], w.rule.until_end.then_some(true));
    }
    params.extend(texts.map(close));
    params
}

/// What `take_over_tokens.sql` answers: the places of tokens that are there, and who has each; 0: the one who asked.
pub(super) fn holders(answer: &[Vec<i64>], asked: &[usize]) -> Result<Vec<(usize, i64)>> {
    let [places, ids] = answer else { return Err(Error::lost("an answer to another question")) };
    let place = |n: i64| usize::try_from(n).ok().and_then(|n| asked.get(n.checked_sub(1)?).copied());
    let pair = |(&n, &id): (&i64, &i64)| {
        place(n).map(|place| (place, id)).ok_or_else(|| Error::lost("an answer to another question"))
    };
    places.iter().zip(ids).map(pair).collect()
}

/// Who holds which of these tokens (places in `wanted`).
pub(super) async fn find(link: &Link, wanted: &[Wanted<'_>], places: &[usize]) -> Result<Vec<Held>> {
    let kinds: Vec<_> = places.iter().map(|&n| wanted[n].kind).collect();
    let tokens: Vec<_> = places.iter().map(|&n| wanted[n].token).collect();
    let rows = link.query("find_tokens", &[&kinds, &tokens]).await?;
    let read = |row: &Row| {
        let n = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
        let place = n.checked_sub(1).and_then(|n| places.get(n)).copied();
        let place = place.ok_or_else(|| Error::lost("an answer to another question"))?;
        Ok(Held { place, id: row.try_get(1)?, may_go: row.try_get(2)? })
    };
    rows.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_sorted_as_bytes_and_named_once() {
        let want = |kind, token, task| Wanted::new(kind, token, task, TokenRule::default());
        let mut wanted =
            vec![want("b", "x", 0), want("a", "é", 1), want("a", "z", 2), want("b", "x", 3), want("a", "Z", 4)];
        let twins = sort(&mut wanted);
        let keys: Vec<_> = wanted.iter().map(|w| (w.kind, w.token, w.task)).collect();
        assert_eq!(keys, [("a", "Z", 4), ("a", "z", 2), ("a", "é", 1), ("b", "x", 0)]);
        assert_eq!(twins, [(3, 0)]);
    }
}
