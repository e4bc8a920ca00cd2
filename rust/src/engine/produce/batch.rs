//! One batch of a stream: tokens first, then ids, then the rows by COPY with their chunks, in one or two round trips.

use std::pin::pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::SinkExt;

use crate::engine::connect::Link;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::copy::{Batch, Blocks, ChunkColumns, Chunker, Group, Home, RowView};
use crate::engine::produce::ids::{EnqueuedIds, Run, RunIter};
use crate::engine::produce::shared::{Param, Shared, Stats};
use crate::engine::produce::swap;
use crate::engine::produce::task::expiries;
use crate::engine::produce::texts::Params;
use crate::engine::produce::tokens::{self, Wanted};
use crate::engine::produce::witness::Witness;

/// A batch, and how it is to be sent.
pub(super) struct Job<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) link: &'a Arc<Link>,
    pub(super) batch: &'a Batch,
    /// Begin a transaction with it.
    pub(super) begin: bool,
    /// And commit it.
    pub(super) commit: bool,
    /// Look for tokens that others hold before ids are given.
    pub(super) prefilter: bool,
}

/// A batch with ids, its tokens taken.
pub(super) struct Ready {
    /// Tasks whose token was held.
    pub(super) duplicates: usize,
    leaf: i16,
    lanes: Vec<i32>,
    /// Ids of each group.
    runs: Vec<Vec<Run>>,
    /// By task, where the batch has tokens: who holds its token, or 0.
    holders: Vec<i64>,
    /// What duplicates bring to those that hold their tokens.
    pub(super) swaps: Vec<Params>,
    /// By group and row, where the batch has tokens and several groups: the task.
    tasks: Vec<Vec<usize>>,
    /// BEGIN is still to be sent.
    begin: Option<String>,
}

impl Job<'_> {
    /// Finds lanes, takes tokens and ids. Where the batch has tokens, the transaction is open afterwards.
    pub(super) async fn prepare(&self) -> Result<Ready> {
        let (shared, batch) = (self.shared, self.batch);
        let deadline = shared.connect_deadline();
        let mut lanes = Vec::with_capacity(batch.groups.len());
        for group in &batch.groups {
            lanes.push(shared.lane(&group.lane, deadline).await?);
        }
        // A token in somebody's open transaction is waited for, but not as long as a silent server.
        let limit = shared.settings.statement_timeout.as_millis() * 4 / 5;
        let mut begin = self.begin.then(|| format!("BEGIN; SET LOCAL lock_timeout = {limit}"));
        let mut ready = Ready {
            duplicates: 0,
            leaf: 0,
            lanes,
            runs: Vec::new(),
            holders: Vec::new(),
            swaps: Vec::new(),
            tasks: Vec::new(),
            begin: None,
        };
        if batch.tokens.is_empty() {
            ready.number(shared, batch).await?;
        } else {
            ready.holders = vec![0; batch.len];
            ready.tasks = tasks_by_group(batch);
            self.take_tokens(&mut ready, begin.take()).await?;
        }
        ready.begin = begin;
        Ok(ready)
    }

    async fn take_tokens(&self, ready: &mut Ready, begin: Option<String>) -> Result<()> {
        let (shared, batch) = (self.shared, self.batch);
        let want = |t: &crate::engine::produce::copy::TokenAt| {
            let (kind, token) = batch.token(t);
            Wanted::new(kind, token, t.task as usize, t.rule)
        };
        let mut wanted: Vec<_> = batch.tokens.iter().map(want).collect();
        let twins = tokens::sort(&mut wanted);
        // A mark only: the first task's id is not known yet.
        for &(twin, _) in &twins {
            ready.holders[twin] = -1;
        }
        if self.prefilter {
            let places: Vec<_> = (0..wanted.len()).collect();
            self.link.prepare("find_tokens").await?;
            for held in tokens::find(self.link, &wanted, &places).await? {
                let w = &wanted[held.place];
                if !held.may_go && !w.locks {
                    ready.holders[w.task] = held.id;
                }
            }
            wanted.retain(|w| ready.holders[w.task] == 0);
        }
        ready.number(shared, batch).await?;
        let mut ids = vec![0; batch.len];
        for (at, runs) in ready.runs.iter().enumerate() {
            let open = ready.tasks[at].iter().filter(|&&task| ready.holders[task] == 0);
            open.zip(RunIter::new(runs.clone())).for_each(|(&task, id)| ids[task] = id);
        }
        let held = tokens::take(shared, self.link, begin.as_deref(), &wanted, |task| ids[task]).await?;
        for (place, holder) in held {
            ready.holders[wanted[place].task] = holder;
            // Rows are left out by giving them no id; what it was is not used again.
            ids[wanted[place].task] = 0;
        }
        for (twin, first) in twins {
            ready.holders[twin] = if ready.holders[first] == 0 { ids[first] } else { ready.holders[first] };
        }
        if let Some(task) = batch.raising().find(|&task| ready.holders[task] != 0) {
            let holder = ready.holders[task];
            return Err(Error::duplicate((!ids.contains(&holder)).then_some(holder)).at(task as u64));
        }
        ready.swaps = swap::of_batch(batch, &ready.tasks, &ready.holders);
        ready.duplicates = ready.holders.iter().filter(|&&holder| holder != 0).count();
        for (at, tasks) in ready.tasks.iter().enumerate() {
            ready.runs[at] = runs_of(tasks.iter().map(|&task| ids[task]).filter(|&id| id != 0));
        }
        Ok(())
    }

    /// Sends rows and chunks, and commits if that was asked for.
    pub(super) async fn send(&self, mut ready: Ready) -> Result<()> {
        let (link, batch) = (self.link, self.batch);
        let (mut chunker, mut blocks) = (Chunker::new(), Blocks::new());
        let (mut later, mut dated) = (Later::default(), Dated::default());
        for (at, group) in batch.groups.iter().enumerate() {
            let home = Home { lane: ready.lanes[at], leaf: ready.leaf };
            if group.is_delayed {
                later.add(group, home.lane, ready.ids(at));
            } else if group.expires() {
                dated.add(group, home.lane, ready.ids(at));
            } else {
                group.finish(home, ready.ids(at), &mut chunker, &mut blocks);
            }
        }
        later.expiries = expiries(later.over.iter().copied());
        let chunks = ChunkColumns::from(chunker.finish());
        let begin = ready.begin.take();
        link.prepare_leaf("copy_tasks", ready.leaf).await?;
        link.prepare("insert_chunks").await?;
        link.prepare("delay_tasks").await?;
        let (dated, dated_chunks) = dated.finish();
        if !dated.ids.is_empty() {
            link.prepare("enqueue_expiring").await?;
        }
        let silent: Option<&str> = None;
        let dated_params: [Param<'_>; 15] = [
            &ready.leaf,
            &dated.ids,
            &dated.lanes,
            &dated.max_attempts,
            &dated.formats,
            &dated.payloads,
            &dated_chunks.lanes,
            &dated_chunks.max_attempts,
            &dated_chunks.task_bytes,
            &dated_chunks.los,
            &dated_chunks.his,
            &silent,
            &silent,
            &dated.expiries,
            &dated_chunks.expiries,
        ];
        let put: [Param<'_>; 6] =
            [&ready.leaf, &chunks.lanes, &chunks.max_attempts, &chunks.task_bytes, &chunks.los, &chunks.his];
        let delay: [Param<'_>; 8] = [
            &later.ids,
            &later.lanes,
            &later.max_attempts,
            &later.formats,
            &later.payloads,
            &later.delays,
            &later.times,
            &later.expiries,
        ];
        let opening = async {
            match &begin {
                Some(begin) => link.batch(begin).await,
                None => Ok(()),
            }
        };
        // Each sends when it is first polled: the commit goes out behind them all.
        let wait = async { if later.ids.is_empty() { Ok(0) } else { link.execute("delay_tasks", &delay).await } };
        let date =
            async { if dated.ids.is_empty() { Ok(0) } else { link.execute("enqueue_expiring", &dated_params).await } };
        let is_last = self.commit && ready.swaps.is_empty();
        let commit = async { if is_last { link.batch("COMMIT").await } else { Ok(()) } };
        Stats::add(&self.shared.stats.statements, 4 + usize::from(!dated.ids.is_empty()));
        if chunks.los.is_empty() {
            let (opened, wait, date, committed) = tokio::join!(opening, wait, date, commit);
            opened.and(wait).and(date)?;
            committed?;
        } else {
            let (opened, sink) = tokio::join!(opening, link.copy_in("copy_tasks", ready.leaf));
            opened?;
            let mut sink = pin!(sink?);
            for block in blocks.finish() {
                // The cause of a failure comes with the answer to the COPY.
                if link.within(sink.send(block)).await.is_err() {
                    break;
                }
            }
            let put = link.execute("insert_chunks", &put);
            let (copied, put, wait, date, committed) =
                tokio::join!(link.within(sink.finish()), put, wait, date, commit);
            let rows = copied?;
            put.and(wait).and(date)?;
            committed?;
            let expected = chunks.los.iter().zip(&chunks.his).map(|(lo, hi)| hi.abs_diff(*lo) + 1).sum::<u64>();
            if rows != expected {
                return Err(Error::new(Kind::Enqueue, format!("COPY took {rows} of {expected} rows")));
            }
        }
        if !ready.swaps.is_empty() {
            swap::send(link, &ready.swaps).await?;
            if self.commit {
                link.batch("COMMIT").await?;
            }
        }
        Ok(())
    }
}

impl Ready {
    /// Gives ids to the tasks whose token nobody is known to hold.
    async fn number(&mut self, shared: &Arc<Shared>, batch: &Batch) -> Result<()> {
        let open = |at: usize, group: &Group| {
            if self.holders.is_empty() {
                group.len
            } else {
                self.tasks[at].iter().filter(|&&task| self.holders[task] == 0).count()
            }
        };
        let counts: Vec<_> = batch.groups.iter().enumerate().map(|(at, group)| open(at, group)).collect();
        let (leaf, runs) = shared.take_ids(counts.iter().sum(), shared.connect_deadline()).await?;
        let mut ids = RunIter::new(runs);
        self.leaf = leaf;
        self.runs = counts.into_iter().map(|n| ids.split(n)).collect();
        Ok(())
    }

    /// The ids of a group's rows; None: not to be written.
    fn ids(&self, at: usize) -> impl Iterator<Item = Option<i64>> {
        let mut ids = RunIter::new(self.runs[at].clone());
        let holders = self.tasks.get(at).map(|tasks| tasks.iter().map(|&task| self.holders[task]));
        let mut holders = holders.into_iter().flatten();
        std::iter::from_fn(move || match holders.next() {
            Some(holder) if holder != 0 => Some(None),
            _ => ids.next().map(Some),
        })
    }

    /// Lanes that get tasks which may start at once.
    pub(super) fn lanes<'a>(&'a self, batch: &'a Batch) -> impl Iterator<Item = i32> + 'a {
        let groups = batch.groups.iter().zip(&self.runs).zip(&self.lanes);
        groups.filter(|((group, runs), _)| !group.is_delayed && !runs.is_empty()).map(|(_, &lane)| lane)
    }

    /// A task that is written with the transaction, by which it can be recognised.
    pub(super) fn witness(&self, batch: &Batch) -> Option<Witness> {
        batch.groups.iter().enumerate().find_map(|(at, group)| {
            let (n, id) = self.ids(at).enumerate().find_map(|(n, id)| Some((n, id?)))?;
            let row = group.rows().nth(n)?;
            Some(Witness::new(id, self.lanes[at], self.leaf, group, n, row))
        })
    }

    /// Adds the answers in input order.
    pub(super) fn answer(&self, batch: &Batch, answers: &mut EnqueuedIds) {
        if self.holders.is_empty() && batch.order.is_empty() {
            self.runs.iter().flatten().for_each(|&run| answers.push_run(run));
            return;
        }
        let mut ids: Vec<_> = self.runs.iter().map(|runs| RunIter::new(runs.clone())).collect();
        for task in 0..batch.len {
            let holder = self.holders.get(task).copied().unwrap_or(0);
            if holder != 0 {
                answers.push(holder, false);
                continue;
            }
            let at = batch.order.get(task).map_or(0, |&at| at as usize);
            if let Some(id) = ids[at].next() {
                answers.push(id, true);
            }
        }
    }
}

/// The tasks of each group, in the order of its rows.
pub(super) fn tasks_by_group(batch: &Batch) -> Vec<Vec<usize>> {
    let mut tasks: Vec<_> = batch.groups.iter().map(|group| Vec::with_capacity(group.len)).collect();
    for task in 0..batch.len {
        tasks[batch.order.get(task).map_or(0, |&at| at as usize)].push(task);
    }
    tasks
}

/// Ids that ascend, as runs.
pub(super) fn runs_of(ids: impl Iterator<Item = i64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for id in ids {
        match runs.last_mut() {
            Some(last) if last.1 + 1 == id => last.1 = id,
            _ => runs.push((id, id)),
        }
    }
    runs
}

/// Tasks that expire, as columns with their chunks.
#[derive(Default)]
struct Dated<'a> {
    tasks: Later<'a>,
    chunker: Chunker,
}

impl<'a> Dated<'a> {
    fn add(&mut self, group: &'a Group, lane: i32, ids: impl Iterator<Item = Option<i64>>) {
        for (n, (row, id)) in group.rows().zip(ids).enumerate() {
            let Some(id) = id else { continue };
            let expires_at = group.expiries.get(n).copied();
            self.tasks.put(id, lane, group.max_attempts, row, expires_at);
            self.chunker.push(id, lane, group.max_attempts, row.payload().len(), expires_at);
        }
    }

    fn finish(self) -> (Later<'a>, ChunkColumns) {
        let mut tasks = self.tasks;
        tasks.expiries = expiries(tasks.over.iter().copied());
        (tasks, ChunkColumns::from(self.chunker.finish()))
    }
}

/// Delayed tasks as columns.
#[derive(Default)]
struct Later<'a> {
    ids: Vec<i64>,
    lanes: Vec<i32>,
    max_attempts: Vec<i16>,
    formats: Vec<i8>,
    payloads: Vec<&'a [u8]>,
    delays: Vec<Option<f64>>,
    times: Vec<Option<SystemTime>>,
    expiries: Vec<Option<SystemTime>>,
    over: Vec<Option<i64>>,
}

impl<'a> Later<'a> {
    fn add(&mut self, group: &'a Group, lane: i32, ids: impl Iterator<Item = Option<i64>>) {
        for (n, ((row, when), id)) in group.rows().zip(&group.whens).zip(ids).enumerate() {
            let Some(id) = id else { continue };
            let (delay, time) = when.columns();
            self.put(id, lane, group.max_attempts, row, group.expiries.get(n).copied());
            self.delays.push(delay);
            self.times.push(time);
        }
    }

    fn put(&mut self, id: i64, lane: i32, max_attempts: i16, row: RowView<'a>, expires_at: Option<i64>) {
        self.ids.push(id);
        self.lanes.push(lane);
        self.max_attempts.push(max_attempts);
        self.formats.push(row.format());
        self.payloads.push(row.payload());
        self.over.push(expires_at);
    }
}
