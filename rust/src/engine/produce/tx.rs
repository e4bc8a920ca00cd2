//! Tasks for a transaction that is not ours: numbered here, written by Python on the user's own connection.
//!
//! The producer's own connection reserves the ids (durable before anybody uses them, whatever becomes of the user's transaction) and makes
//! lanes that are new (committed at once, so that two users' transactions never wait for each other's lane). What is written then,
//! statement by statement, is said here; who sends it is none of the engine's business. Parameters are arrays as text: see
//! `enqueue_tx.sql`.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;

use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::batch::{runs_of, tasks_by_group};
use crate::engine::produce::copy::{Batch, Blocks, Chunk, Chunker, Home};
use crate::engine::produce::ids::{EnqueuedIds, Run, RunIter};
use crate::engine::produce::swap;
use crate::engine::produce::task::{LaneKey, TokenRule, When};
use crate::engine::produce::texts::{Params, add, add_bytes, add_or_null, bytes, close};
use crate::engine::produce::tokens::{self, Wanted};
use crate::engine::produce::{SMALL_BYTES, SMALL_TASKS};

/// Elements of one parameter: what a server parses without effort.
const SLICE: usize = 10_000;
/// Payload bytes of one statement: in hexadecimal twice as much.
const SLICE_BYTES: usize = 4 * 1024 * 1024;
/// Encoded bytes of one call: it is held in memory as a whole, so that nothing is sent before all of it is checked.
const CALL_BYTES: usize = 1024 * 1024 * 1024;
/// Parameters of `enqueue_tx.sql`.
const PARAMS: usize = 24;

/// What the producer's own connection gives.
#[derive(Debug)]
pub struct Supplied {
    /// The open leaf.
    pub leaf: i16,
    /// Of each group.
    pub lanes: Vec<i32>,
    /// Reserved ids.
    pub runs: Vec<Run>,
}

/// Tasks that were read and checked, on their way into somebody's transaction.
#[derive(Debug)]
pub struct TxTasks {
    batch: Batch,
    /// The tasks of each group, in the order of its rows.
    tasks: Vec<Vec<usize>>,
    /// Places in the batch's tokens: sorted, each token once.
    wanted: Vec<usize>,
    /// Tasks whose token an earlier task of the call has.
    twins: Vec<(usize, usize)>,
    leaf: i16,
    lanes: Vec<i32>,
    /// By task; 0: none.
    ids: Vec<i64>,
    /// By task: who holds its token; 0: nobody is known to, -1: an earlier task of the call.
    holders: Vec<i64>,
    /// By task: the token is its own now.
    has_token: Vec<bool>,
    /// By task: there is a token to take.
    wants_token: Vec<bool>,
    /// Tokens that were asked for last: positions in `wanted`.
    asked: Vec<usize>,
    /// Those of them that somebody has who may lose them, or whose task is to be changed.
    loose: Vec<usize>,
    /// By task: its token was taken over after the statement that would have written it.
    is_due: Vec<bool>,
    /// By token of the batch: a task that wants it would change its holder.
    locks: Vec<bool>,
}

impl TxTasks {
    /// Nothing but the order in which tokens are taken is decided.
    pub fn new(batch: Batch) -> Result<Self> {
        check_size(&batch)?;
        let mut wanted: Vec<_> = batch
            .tokens
            .iter()
            .enumerate()
            .map(|(place, t)| (batch.token(t), t.task as usize, place))
            .map(|((kind, token), task, place)| (Wanted::new(kind, token, task, batch.tokens[place].rule), place))
            .collect();
        let mut order: Vec<_> = wanted.iter().map(|w| w.0).collect();
        let twins = tokens::sort(&mut order);
        // A task has one token at most, so tasks name places.
        wanted.sort_unstable_by_key(|w| w.0.task);
        let place_of = |task: usize| wanted.binary_search_by_key(&task, |w| w.0.task).ok().map(|n| wanted[n].1);
        let sorted = order.iter().filter_map(|w| place_of(w.task)).collect();
        let mut locks = vec![false; batch.tokens.len()];
        order.iter().filter(|w| w.locks).filter_map(|w| place_of(w.task)).for_each(|place| locks[place] = true);
        let (mut holders, mut wants_token) = (vec![0; batch.len], vec![false; batch.len]);
        for &(twin, _) in &twins {
            holders[twin] = -1;
        }
        batch.tokens.iter().for_each(|t| wants_token[t.task as usize] = true);
        Ok(Self {
            tasks: tasks_by_group(&batch),
            wanted: sorted,
            twins,
            leaf: 0,
            lanes: Vec::new(),
            ids: vec![0; batch.len],
            holders,
            has_token: vec![false; batch.len],
            wants_token,
            asked: Vec::new(),
            loose: Vec::new(),
            is_due: vec![false; batch.len],
            locks,
            batch,
        })
    }

    /// How many tasks.
    pub fn len(&self) -> usize {
        self.batch.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.batch.len == 0
    }

    /// Few enough for one statement, whose tokens ask for no other.
    pub fn is_small(&self) -> bool {
        self.batch.len <= SMALL_TASKS && self.batch.bytes() <= SMALL_BYTES && !self.has_rules()
    }

    fn has_rules(&self) -> bool {
        self.batch.tokens.iter().any(|t| TokenRule { scope: t.rule.scope, ..TokenRule::default() } != t.rule)
    }

    /// The lanes of its groups.
    pub fn keys(&self) -> Vec<Arc<LaneKey>> {
        self.batch.groups.iter().map(|group| Arc::clone(&group.lane)).collect()
    }

    /// How many ids it needs: a task whose token is known to be another's needs none.
    pub fn needs(&self) -> usize {
        self.holders.iter().filter(|&&holder| holder == 0).count()
    }

    /// Gives ids: tasks that are alike get neighbours.
    pub fn number(&mut self, supplied: Supplied) {
        (self.leaf, self.lanes) = (supplied.leaf, supplied.lanes);
        let open = self.tasks.iter().flatten().filter(|&&task| self.holders[task] == 0);
        for (&task, id) in open.zip(RunIter::new(supplied.runs)) {
            self.ids[task] = id;
        }
    }

    /// Whether a token is neither taken nor known to be another's.
    pub fn has_open_tokens(&self) -> bool {
        self.open_tokens().next().is_some()
    }

    fn task_at(&self, n: usize) -> usize {
        self.batch.tokens[self.wanted[n]].task as usize
    }

    /// Positions in `wanted`.
    fn open_tokens(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.wanted.len()).filter(|&n| self.holders[self.task_at(n)] == 0 && !self.has_token[self.task_at(n)])
    }

    /// The parameters of `find_tokens_tx.sql` for the open tokens, some at a time, each with the number by which `found` knows them.
    pub fn find(&mut self) -> Vec<(usize, Params)> {
        self.asked = self.open_tokens().collect();
        self.loose.clear();
        let slices = self.asked.chunks(SLICE).enumerate();
        slices.map(|(at, asked)| (at * SLICE, self.token_params(asked).to_vec())).collect()
    }

    /// Who holds what was asked for: places from 1 in the statement with that number, ids, and 1 where the token may be free by now.
    pub fn found(&mut self, number: usize, places: &[i64], ids: &[i64], may_go: &[i64]) -> Result<()> {
        for ((&place, &id), &may_go) in places.iter().zip(ids).zip(may_go) {
            let at =
                usize::try_from(place).ok().and_then(|n| n.checked_sub(1)).and_then(|n| self.asked.get(number + n));
            let at = *at.ok_or_else(|| Error::new(Kind::Enqueue, "the database answered another question"))?;
            let task = self.task_at(at);
            if self.ids[task] == id {
                return Err(Error::new(
                    Kind::Enqueue,
                    "the ids that the database handed out are taken: it went back in time; roll your transaction back and run it again",
                ));
            }
            if may_go != 0 || self.locks[self.wanted[at]] {
                self.loose.push(at);
            } else {
                self.holders[task] = id;
            }
        }
        Ok(())
    }

    fn wanted_at(&self, n: usize) -> Wanted<'_> {
        let t = &self.batch.tokens[self.wanted[n]];
        let (kind, token) = self.batch.token(t);
        Wanted::new(kind, token, t.task as usize, t.rule)
    }

    fn lent_params(&self, asked: &[usize]) -> Params {
        let wanted: Vec<_> = asked.iter().map(|&n| self.wanted_at(n)).collect();
        tokens::lent_params(wanted.iter().map(|w| (w, self.ids[w.task])))
    }

    /// The parameters of `hold_tokens.sql` and `take_over_tokens.sql` for tokens that may be free by now, some at a time, each with the
    /// number by which `took_over` knows them.
    pub fn take_over(&self) -> Vec<(usize, Params, Params)> {
        let slices = self.loose.chunks(SLICE).enumerate();
        slices.map(|(at, asked)| (at * SLICE, self.token_params(asked).to_vec(), self.lent_params(asked))).collect()
    }

    /// Their answer: places from 1 in the statement with that number, and who has each; 0: the task that wants it.
    pub fn took_over(&mut self, number: usize, places: Vec<i64>, ids: Vec<i64>) -> Result<()> {
        let asked = self.loose.get(number..).unwrap_or_default();
        for (at, holder) in tokens::holders(&[places, ids], asked)? {
            let task = self.task_at(at);
            if holder == 0 {
                (self.has_token[task], self.is_due[task]) = (true, true);
            } else {
                self.holders[task] = holder;
            }
        }
        Ok(())
    }

    /// By task: who holds its token, an earlier task of the call, too.
    fn all_holders(&self) -> Vec<i64> {
        let mut holders = self.holders.clone();
        for &(twin, first) in &self.twins {
            holders[twin] = if holders[first] == 0 { self.ids[first] } else { holders[first] };
        }
        holders
    }

    /// An error where a task has met its token that must not; its index is the task's.
    pub fn check(&self) -> Result<()> {
        let holders = self.all_holders();
        let Some(task) = self.batch.raising().find(|&task| holders[task] != 0) else { return Ok(()) };
        let is_own = self.ids.contains(&holders[task]);
        Err(Error::duplicate((!is_own).then_some(holders[task])).at(task as u64))
    }

    /// What duplicates bring to those that hold their tokens: statements and parameters, in order.
    pub fn swaps(&self) -> Vec<(&'static str, Params)> {
        let swaps = swap::of_batch(&self.batch, &self.tasks, &self.all_holders());
        swap::STATEMENTS.iter().flat_map(|&name| swaps.iter().map(move |params| (name, params.clone()))).collect()
    }

    fn token_params(&self, asked: &[usize]) -> [String; 2] {
        let tokens = || asked.iter().map(|&n| self.batch.token(&self.batch.tokens[self.wanted[n]]));
        [bytes(tokens().map(|t| t.0.as_bytes())), bytes(tokens().map(|t| t.1.as_bytes()))]
    }

    /// All of a small call in one statement; after the first time only the tasks whose token was freed, or taken over, meanwhile.
    pub fn write_small(&mut self, is_first: bool) -> Params {
        let asked: Vec<_> = self.open_tokens().collect();
        let mut columns = Columns::new(self.leaf);
        columns.take(self, &asked);
        for (at, group) in self.batch.groups.iter().enumerate() {
            let (mut whens, mut expiries) = (group.whens.iter(), group.expiries.iter().copied());
            for (row, &task) in group.rows().zip(&self.tasks[at]) {
                let (when, expires_at) = (whens.next(), expiries.next());
                let is_open = self.holders[task] == 0 && !self.has_token[task];
                if self.is_due[task] || (is_open && (is_first || self.wants_token[task])) {
                    let (id, lane, max_attempts) = (self.ids[task], self.lanes[at], group.max_attempts);
                    let content = Content { id, lane, max_attempts, expires_at };
                    match when {
                        Some(when) => columns.put_later(content, row.format(), row.payload(), *when),
                        None => columns.put_now(content, row.format(), row.payload(), self.wants_token[task]),
                    }
                }
            }
        }
        self.is_due.fill(false);
        columns.finish()
    }

    /// The tokens of a large call that are open, in order, some at a time: statements and parameters.
    pub fn take(&self) -> Vec<(&'static str, Params)> {
        let open: Vec<_> = self.open_tokens().collect();
        let slice = |asked: &[usize]| {
            if asked.iter().any(|&n| self.wanted_at(n).rule.is_lent()) {
                return ("take_tokens", self.lent_params(asked));
            }
            let mut columns = Columns::new(self.leaf);
            columns.take(self, asked);
            ("enqueue_tx", columns.finish())
        };
        open.chunks(SLICE).map(slice).collect()
    }

    /// These ids have their tokens.
    pub fn took(&mut self, ids: &[i64]) {
        let ids: HashSet<_> = ids.iter().copied().collect();
        for n in 0..self.wanted.len() {
            let task = self.task_at(n);
            if ids.contains(&self.ids[task]) {
                self.has_token[task] = true;
            }
        }
    }

    fn ids_of(&self, group: usize) -> impl Iterator<Item = Option<i64>> + '_ {
        self.tasks[group].iter().map(|&task| (self.holders[task] == 0).then_some(self.ids[task]))
    }

    /// A large call's rows as binary COPY in blocks, and the statements that follow it: chunks, tasks for later, and tasks that expire.
    pub fn write_large(&self) -> (Vec<Bytes>, Vec<Params>) {
        let (mut chunker, mut blocks) = (Chunker::new(), Blocks::new());
        let mut statements = Vec::new();
        let mut later = Columns::new(self.leaf);
        for (at, group) in self.batch.groups.iter().enumerate() {
            let lane = self.lanes[at];
            if !group.is_delayed && !group.expires() {
                group.finish(Home { lane, leaf: self.leaf }, self.ids_of(at), &mut chunker, &mut blocks);
                continue;
            }
            for (n, (row, id)) in group.rows().zip(self.ids_of(at)).enumerate() {
                let Some(id) = id else { continue };
                let expires_at = group.expiries.get(n).copied();
                let content = Content { id, lane, max_attempts: group.max_attempts, expires_at };
                match group.whens.get(n) {
                    Some(when) => later.put_later(content, row.format(), row.payload(), *when),
                    None => later.put_now(content, row.format(), row.payload(), false),
                }
                if later.is_full() {
                    statements.push(std::mem::replace(&mut later, Columns::new(self.leaf)).finish());
                }
            }
        }
        if later.tasks > 0 {
            statements.push(later.finish());
        }
        let chunks = chunker.finish();
        let blocks = if chunks.is_empty() { Vec::new() } else { blocks.finish() };
        for some in chunks.chunks(SLICE) {
            let mut columns = Columns::new(self.leaf);
            for chunk in some {
                columns.put_chunk(chunk);
            }
            statements.push(columns.finish());
        }
        (blocks, statements)
    }

    /// The leaf that it writes to.
    pub fn leaf(&self) -> i16 {
        self.leaf
    }

    /// Lanes that get tasks which may start at once, and the id of one of these tasks.
    pub fn news(&self) -> (Vec<i32>, Option<i64>) {
        let (mut lanes, mut witness) = (Vec::new(), None);
        for (at, group) in self.batch.groups.iter().enumerate() {
            if !group.is_delayed
                && let Some(id) = self.ids_of(at).flatten().next()
            {
                lanes.push(self.lanes[at]);
                witness = Some(id);
            }
        }
        lanes.sort_unstable();
        lanes.dedup();
        (lanes, witness)
    }

    /// Each task's id and whether it is new, in input order.
    pub fn answer(&self) -> EnqueuedIds {
        let holders = self.all_holders();
        let mut ids = EnqueuedIds::default();
        if self.batch.tokens.is_empty() {
            for run in runs_of(self.ids.iter().copied()) {
                ids.push_run(run);
            }
        } else {
            for (&id, &holder) in self.ids.iter().zip(&holders) {
                if holder == 0 { ids.push(id, true) } else { ids.push(holder, false) }
            }
        }
        ids
    }
}

/// Refuses what could not be held, or numbered by 32 bits.
pub fn check_size(batch: &Batch) -> Result<()> {
    if batch.bytes() > CALL_BYTES {
        let message =
            "the call has more than 1 GiB of encoded tasks, all of which it holds in memory: make several calls";
        return Err(Error::new(Kind::Enqueue, message));
    }
    Ok(())
}

/// What a task's row holds but for its payload.
#[derive(Clone, Copy)]
struct Content {
    id: i64,
    lane: i32,
    max_attempts: i16,
    expires_at: Option<i64>,
}

/// The parameters of `enqueue_tx.sql` while they are filled.
struct Columns {
    texts: [String; PARAMS],
    chunker: Chunker,
    tasks: usize,
    bytes: usize,
    /// Elements so far of tasks, chunks and tasks for later.
    counts: [usize; 3],
}

// Parameters by their place.
const TYPES: usize = 1;
const TOKENS: usize = 2;
const TOKEN_IDS: usize = 3;
const NOW: usize = 4;
const CHUNKS: usize = 9;
const LATER: usize = 14;
const EXPIRIES: usize = 21;

impl Columns {
    fn new(leaf: i16) -> Self {
        let mut texts = [(); PARAMS].map(|()| String::new());
        add(&mut texts[0], leaf);
        Self { texts, chunker: Chunker::new(), tasks: 0, bytes: 0, counts: [0; 3] }
    }

    fn is_full(&self) -> bool {
        self.tasks >= SLICE || self.bytes >= SLICE_BYTES
    }

    fn take(&mut self, tasks: &TxTasks, asked: &[usize]) {
        [self.texts[TYPES], self.texts[TOKENS]] = tasks.token_params(asked);
        for &n in asked {
            add(&mut self.texts[TOKEN_IDS], tasks.ids[tasks.task_at(n)]);
        }
    }

    fn put(&mut self, start: usize, content: Content, format: i8, payload: &[u8]) {
        self.tasks += 1;
        self.bytes += payload.len();
        add(&mut self.texts[start], content.id);
        add(&mut self.texts[start + 1], content.lane);
        add(&mut self.texts[start + 2], content.max_attempts);
        add(&mut self.texts[start + 3], char::from(format.cast_unsigned()));
        add_bytes(&mut self.texts[start + 4], payload);
    }

    fn put_now(&mut self, content: Content, format: i8, payload: &[u8], is_alone: bool) {
        self.put(NOW, content, format, payload);
        self.put_expiry(0, content.expires_at);
        if is_alone {
            self.chunker.cut();
        }
        self.chunker.push(content.id, content.lane, content.max_attempts, payload.len(), content.expires_at);
        if is_alone {
            self.chunker.cut();
        }
    }

    fn put_later(&mut self, content: Content, format: i8, payload: &[u8], when: When) {
        self.put(LATER, content, format, payload);
        self.put_expiry(2, content.expires_at);
        let (delay, us) = match when {
            When::After(seconds) => (seconds.to_string(), "NULL".to_owned()),
            When::At(us) => ("NULL".to_owned(), us.to_string()),
        };
        add(&mut self.texts[LATER + 5], delay);
        add(&mut self.texts[LATER + 6], us);
    }

    fn put_chunk(&mut self, chunk: &Chunk) {
        add(&mut self.texts[CHUNKS], chunk.lane);
        add(&mut self.texts[CHUNKS + 1], chunk.max_attempts);
        add(&mut self.texts[CHUNKS + 2], chunk.task_bytes);
        add(&mut self.texts[CHUNKS + 3], chunk.lo);
        add(&mut self.texts[CHUNKS + 4], chunk.hi);
        self.put_expiry(1, chunk.expires_at);
    }

    /// An element more of one of the last three parameters, which stay empty until something expires.
    fn put_expiry(&mut self, which: usize, expires_at: Option<i64>) {
        let (text, before) = (&mut self.texts[EXPIRIES + which], self.counts[which]);
        self.counts[which] += 1;
        if expires_at.is_none() && text.is_empty() {
            return;
        }
        if text.is_empty() {
            (0..before).for_each(|_| add(text, "NULL"));
        }
        add_or_null(text, expires_at);
    }

    fn finish(mut self) -> Params {
        for chunk in std::mem::take(&mut self.chunker).finish() {
            self.put_chunk(&chunk);
        }
        self.texts.map(close).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::produce::task::{Format, TokenRule};

    fn tasks(what: &[(&str, Option<When>, Option<&str>)]) -> TxTasks {
        let mut batch = Batch::default();
        let mut lanes: Vec<Arc<LaneKey>> = Vec::new();
        for (kind, when, token) in what {
            if !lanes.iter().any(|lane| lane.kind == *kind) {
                lanes.push(LaneKey::new("default", kind, 0).unwrap());
            }
            let lane = lanes.iter().find(|lane| lane.kind == *kind).unwrap();
            let at = batch.group(lane, 3, when.is_some(), false);
            batch
                .push(at, *when, None, token.map(|token| (token, TokenRule::default())), Format::Json, |out| {
                    out.extend_from_slice(b"{}");
                    Ok::<(), ()>(())
                })
                .unwrap();
        }
        let mut tasks = TxTasks::new(batch).unwrap();
        let (lanes, n) = ((1..).take(tasks.keys().len()).collect(), i64::try_from(tasks.needs()).unwrap());
        tasks.number(Supplied { leaf: 2, lanes, runs: vec![(101, 100 + n)] });
        tasks
    }

    fn answers(tasks: &TxTasks) -> Vec<(i64, bool)> {
        let ids = tasks.answer();
        (0..ids.len()).filter_map(|n| ids.get(n)).collect()
    }

    #[test]
    fn a_task_is_written_as_arrays() {
        let params = tasks(&[("a", None, None)]).write_small(true);
        assert_eq!(params.len(), PARAMS);
        assert_eq!(params[..4], ["{2}", "{}", "{}", "{}"]);
        assert_eq!(params[4..9], ["{101}", "{1}", "{3}", "{j}", r#"{"\\x7b7d"}"#]);
        assert_eq!(params[9..14], ["{1}", "{3}", "{2}", "{101}", "{101}"]);
        assert!(params[14..].iter().all(|p| p == "{}"));
    }

    #[test]
    fn times_are_seconds_or_microseconds() {
        let params = tasks(&[("a", Some(When::After(1.5)), None), ("a", Some(When::At(-7)), None)]).write_small(true);
        assert_eq!((params[19].as_str(), params[20].as_str()), ("{1.5,NULL}", "{NULL,-7}"));
        assert_eq!((params[4].as_str(), params[14].as_str(), params[9].as_str()), ("{}", "{101,102}", "{}"));
    }

    #[test]
    fn tokens_are_sorted_twins_left_out_and_each_is_a_chunk_of_its_own() {
        let mut tasks = tasks(&[
            ("a", None, Some("z")),
            ("a", None, None),
            ("a", None, None),
            ("a", None, Some("b")),
            ("a", None, Some("z")),
        ]);
        let params = tasks.write_small(true);
        assert_eq!(params[2], r#"{"\\x62","\\x7a"}"#);
        assert_eq!(params[3], "{104,101}");
        assert_eq!((params[12].as_str(), params[13].as_str()), ("{101,102,104}", "{101,103,104}"));
        tasks.took(&[104]);
        assert!(tasks.has_open_tokens());
        let [(number, _)] = &tasks.find()[..] else { panic!() };
        let number = *number;
        tasks.found(number, &[1], &[55], &[0]).unwrap();
        assert!(!tasks.has_open_tokens());
        assert_eq!(answers(&tasks), [(55, false), (102, true), (103, true), (104, true), (55, false)]);
    }

    #[test]
    fn a_token_that_was_freed_is_taken_by_a_statement_that_writes_nothing_else() {
        let mut tasks = tasks(&[("a", None, None), ("a", None, Some("z"))]);
        tasks.find();
        tasks.found(0, &[], &[], &[]).unwrap();
        let params = tasks.write_small(false);
        assert_eq!((params[3].as_str(), params[4].as_str()), ("{102}", "{102}"));
        tasks.took(&[102]);
        assert_eq!(answers(&tasks), [(101, true), (102, true)]);
    }

    #[test]
    fn a_token_that_answers_with_our_own_id_says_that_the_id_is_not_ours() {
        let mut tasks = tasks(&[("a", None, Some("z"))]);
        tasks.find();
        assert!(tasks.found(0, &[1], &[101], &[0]).is_err());
    }

    #[test]
    fn large_calls_leave_out_what_is_held_and_delay_by_statement() {
        let mut tasks = tasks(&[("a", None, None), ("b", Some(When::After(1.0)), None), ("a", None, Some("t"))]);
        tasks.find();
        tasks.found(0, &[1], &[7], &[0]).unwrap();
        let (blocks, statements) = tasks.write_large();
        assert!(!blocks.is_empty());
        assert_eq!(statements.len(), 2);
        assert_eq!(statements[0][14], "{103}");
        assert_eq!((statements[1][12].as_str(), statements[1][13].as_str()), ("{101}", "{101}"));
        assert_eq!(tasks.news(), (vec![1], Some(101)));
    }
}
