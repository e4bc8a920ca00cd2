//! What a task whose token is held brings to the one that holds it: payloads and times of tasks that wait (`on_conflict`).

use std::collections::BTreeMap;

use crate::engine::connect::Link;
use crate::engine::error::Result;
use crate::engine::produce::copy::Batch;
use crate::engine::produce::task::{NewTask, OnConflict, When};
use crate::engine::produce::texts::{self, Params, add, add_bytes, add_or_null, close};

/// The statements, in the order in which tasks flow and rows are locked.
pub(super) const STATEMENTS: [&str; 2] = ["replace_delayed", "replace_ready"];
/// Tasks and payload bytes of one statement.
const SLICE: usize = 1_000;
const SLICE_BYTES: usize = 4 * 1024 * 1024;

/// A task as far as it may replace another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content<'a> {
    format: i8,
    payload: &'a [u8],
    when: Option<When>,
}

impl<'a> From<&'a NewTask> for Content<'a> {
    fn from(task: &'a NewTask) -> Self {
        Self { format: task.format, payload: &task.payload, when: task.when }
    }
}

/// What becomes of the holders' tasks, by id: the last that brings something wins.
#[derive(Debug, Default)]
pub(super) struct Swaps<'a>(BTreeMap<i64, Swap<'a>>);

/// Format and payload, and the time, where they change.
type Swap<'a> = (Option<(i8, &'a [u8])>, Option<When>);

impl<'a> Swaps<'a> {
    /// A task brings what it has to the holder. In input order.
    pub(super) fn bring(&mut self, holder: i64, on_conflict: OnConflict, content: Content<'a>) {
        let OnConflict::Replace { payload, time } = on_conflict else { return };
        let time = content.when.filter(|_| time);
        if payload || time.is_some() {
            let swap = self.0.entry(holder).or_default();
            swap.0 = payload.then_some((content.format, content.payload)).or(swap.0);
            swap.1 = time.or(swap.1);
        }
    }

    /// The parameters of [`STATEMENTS`], ascending by id.
    pub(super) fn params(&self) -> Vec<Params> {
        let mut all = Vec::new();
        let (mut texts, mut tasks, mut bytes) = ([const { String::new() }; 5], 0, 0);
        for (id, (content, when)) in &self.0 {
            let size = content.map_or(0, |c| c.1.len());
            if tasks > 0 && (tasks >= SLICE || bytes + size > SLICE_BYTES) {
                all.push(std::mem::replace(&mut texts, [const { String::new() }; 5]).map(close).into());
                (tasks, bytes) = (0, 0);
            }
            (tasks, bytes) = (tasks + 1, bytes + size);
            add(&mut texts[0], id);
            match content {
                Some((format, payload)) => {
                    add(&mut texts[1], char::from(format.cast_unsigned()));
                    add_bytes(&mut texts[2], payload);
                }
                None => texts[1..3].iter_mut().for_each(|text| add(text, "NULL")),
            }
            let (delay, us) = match when {
                Some(When::After(seconds)) => (Some(seconds), None),
                Some(When::At(us)) => (None, Some(us)),
                None => (None, None),
            };
            add_or_null(&mut texts[3], delay);
            add_or_null(&mut texts[4], us);
        }
        if tasks > 0 {
            all.push(texts.map(close).into());
        }
        all
    }
}

/// What a batch's tasks bring to their tokens' holders; 0 holds nothing of others.
pub(super) fn of_batch(batch: &Batch, tasks: &[Vec<usize>], holders: &[i64]) -> Vec<Params> {
    if !batch.tokens.iter().any(|t| t.rule.replaces() && holders[t.task as usize] != 0) {
        return Vec::new();
    }
    let mut contents = vec![None; batch.len];
    for (group, tasks) in batch.groups.iter().zip(tasks) {
        let mut whens = group.whens.iter();
        for (row, &task) in group.rows().zip(tasks) {
            contents[task] =
                Some(Content { format: row.format(), payload: row.payload(), when: whens.next().copied() });
        }
    }
    let mut swaps = Swaps::default();
    for t in &batch.tokens {
        let task = t.task as usize;
        if let (true, Some(content)) = (holders[task] != 0, contents[task]) {
            swaps.bring(holders[task], t.rule.on_conflict, content);
        }
    }
    swaps.params()
}

/// Sends them, in the transaction that holds the tokens.
pub(super) async fn send(link: &Link, swaps: &[Params]) -> Result<()> {
    for name in STATEMENTS {
        for params in swaps {
            texts::ask(link, name, params.clone()).await?;
        }
    }
    Ok(())
}
