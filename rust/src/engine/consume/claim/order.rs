//! Which lanes a claim asks for, and in which order.
//!
//! Queues take turns, and within one the types of a priority do. A higher priority comes first, strictly: while more of it is known to
//! wait, a claim asks for nothing below it in the same queue. A type at its own cap does not hold up what is below: its tasks could not start.
//! Where nothing is known to wait above, what is there is asked for all the same, before what is below and in the same claim, and often
//! from the lane's start: tasks that nobody announced, or that were committed late, come first, too.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::engine::consume::claim::{Asked, Claimer, FEWEST_CHUNKS, Lane, MOST_CHUNKS, SOON, SWEEP_SHARE, saturating};
use crate::engine::consume::sched::Wants;

/// The lanes of one queue by falling priority: places in the claimer's list.
type Levels = Vec<Vec<usize>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Order {
    queues: Vec<Levels>,
    turn: usize,
    /// A claim of a lower priority each so many; 0: none.
    ageing: usize,
    claims: usize,
    aged: usize,
    /// When lanes above others were last asked for from their start, and how long that claim took.
    led: Option<Instant>,
    lead_time: Duration,
}

/// How the next claim goes about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// All lanes, from their start.
    pub(super) sweep: bool,
    /// Lanes above others from their start.
    lead: bool,
    /// One of the lower priorities alone.
    is_aged: bool,
}

/// A lane in a claim.
struct Pick {
    at: usize,
    /// Nothing is known to wait there: asked for only because of what is below.
    is_guard: bool,
    /// There is something below, which must get nothing while more is here: as many chunks as it may take.
    is_above: bool,
}

impl Order {
    pub(super) fn new(ageing: usize) -> Self {
        Self { ageing, ..Self::default() }
    }

    /// The lanes are others now.
    pub(super) fn sort(&mut self, lanes: &[Lane]) {
        let mut queues: Vec<(&str, Vec<usize>)> = Vec::new();
        for (at, lane) in lanes.iter().enumerate() {
            match queues.iter_mut().find(|(queue, _)| **queue == *lane.queue) {
                Some((_, own)) => own.push(at),
                None => queues.push((&lane.queue, vec![at])),
            }
        }
        let levels = |mut own: Vec<usize>| {
            own.sort_by_key(|&at| std::cmp::Reverse(lanes[at].priority));
            own.chunk_by(|&a, &b| lanes[a].priority == lanes[b].priority).map(<[usize]>::to_vec).collect()
        };
        self.queues = queues.into_iter().map(|(_, own)| levels(own)).collect();
    }

    /// Begins a claim.
    pub(super) fn next(&mut self, sweep: bool) -> Plan {
        self.turn = self.turn.wrapping_add(1);
        let has_levels = self.queues.iter().any(|levels| levels.len() > 1);
        let due = self.led.is_none_or(|led| led.elapsed() >= (self.lead_time * SWEEP_SHARE).max(SOON));
        let mut is_aged = false;
        if has_levels && self.ageing > 0 && !sweep {
            self.claims += 1;
            is_aged = self.claims.is_multiple_of(self.ageing);
            self.aged += usize::from(is_aged);
        }
        Plan { sweep, lead: has_levels && due, is_aged }
    }

    /// The claim is over.
    pub(super) fn note(&mut self, plan: Plan, began: Instant) {
        if plan.lead || plan.sweep {
            self.led = Some(began);
            self.lead_time = began.elapsed();
        }
    }
}

impl Claimer<'_> {
    /// What to ask for. Nothing of lanes whose types want nothing.
    pub(super) fn ask(&self, wants: &Wants, plan: Plan, bytes: usize) -> Asked {
        let startable = self.shared.sched.lock().startable();
        let settings = &self.shared.settings;
        let mut asked =
            Asked { tasks: saturating(wants.tasks), bytes: saturating(wants.bytes.min(bytes)), ..Asked::default() };
        let mut most: HashMap<usize, i64> = HashMap::new();
        let count = self.order.queues.len();
        for step in 0..count {
            let levels = &self.order.queues[(step + self.order.turn) % count];
            for pick in self.pick(levels, wants, plan, &mut asked.is_held) {
                let lane = &self.lanes[pick.at];
                let Some(want) = wants.types.iter().find(|w| w.kind == lane.kind) else { continue };
                let uncapped = want.slow && startable > 0 && settings.kinds[lane.kind].workers >= settings.concurrency;
                let (group, tasks) = if uncapped { (settings.kinds.len(), startable) } else { (lane.kind, want.tasks) };
                let from_start = plan.sweep || (plan.lead && pick.is_above);
                let chunks = if pick.is_above && !lane.more { MOST_CHUNKS } else { lane.chunks };
                for track in [1_i16, 0] {
                    let hint = if from_start { 0 } else { lane.hints[usize::from(track.unsigned_abs())] };
                    asked.push(lane, track, hint, group, tasks, chunks);
                }
                let chunks = chunks.min(saturating(tasks));
                most.entry(group).and_modify(|m| *m = (*m).max(chunks)).or_insert(chunks);
            }
        }
        asked.limit = most.values().sum::<i64>().max(FEWEST_CHUNKS);
        asked
    }

    /// The lanes of one queue in order; `is_held` where some are left out for what waits above them.
    fn pick(&self, levels: &Levels, wants: &Wants, plan: Plan, is_held: &mut bool) -> Vec<Pick> {
        let wanted = |at: usize| wants.types.iter().any(|w| w.kind == self.lanes[at].kind);
        let is_waiting = |at: usize| wanted(at) && (plan.sweep || self.lanes[at].maybe);
        if plan.is_aged && levels.len() > 1 {
            let lower = levels.len() - 1;
            let in_turn = (0..lower).map(|step| &levels[1 + (self.order.aged + step) % lower]);
            if let Some(level) = in_turn.into_iter().find(|level| level.iter().any(|&at| is_waiting(at))) {
                let own = self.in_turn(level).filter(|&at| is_waiting(at));
                return own.map(|at| Pick { at, is_guard: false, is_above: false }).collect();
            }
        }
        let mut picks = Vec::new();
        for (depth, level) in levels.iter().enumerate() {
            let is_above = depth + 1 < levels.len();
            let own = self.in_turn(level).filter(|&at| is_waiting(at) || (is_above && wanted(at)));
            picks.extend(own.map(|at| Pick { at, is_guard: !is_waiting(at), is_above }));
            if is_above && level.iter().any(|&at| self.lanes[at].more && (wanted(at) || self.is_uncapped(at))) {
                *is_held |= levels[depth + 1..].iter().flatten().any(|&at| is_waiting(at));
                break;
            }
        }
        let end = picks.iter().rposition(|pick| !pick.is_guard).map_or(0, |last| last + 1);
        picks.truncate(end);
        picks
    }

    fn in_turn<'a>(&self, level: &'a [usize]) -> impl Iterator<Item = usize> + use<'a> {
        let turn = self.order.turn / self.order.queues.len().max(1);
        let first = turn % level.len();
        level[first..].iter().chain(&level[..first]).copied()
    }

    /// Its tasks may take every slot.
    fn is_uncapped(&self, at: usize) -> bool {
        self.shared.settings.kinds[self.lanes[at].kind].workers >= self.shared.settings.concurrency
    }
}
