"""The steps of the protocol by which tasks are claimed, run, ended and rescued: all that can happen in each state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from scenes import Scene
from states import (
    ANSWERED,
    BACK,
    COMPLETED,
    FAILED,
    RUNNING,
    SEEN,
    SENT,
    SHARED,
    UNDONE,
    WAITING,
    Call,
    Claim,
    Hold,
    Leader,
    Member,
    State,
    Step,
    Task,
    Violation,
    Worker,
    first_ready,
    held_by,
    is_locked,
    kill,
    names_of,
    pass_dead_time,
    put,
    renumbered,
    replaced,
    running_of,
    set_call,
    set_leader,
    set_worker,
    tasks_of,
    tells,
    text_of,
    with_call,
    without_call,
)
from transactions import Transactions

#: Guards that can be taken out: what each of them is.
GUARDS: Final = {
    "fence": "a result counts only for what its claim still holds (complete_tasks, fail_tasks, give_back_tasks)",
    "lock": "a result locks its claim and decides on the locked row, not on its snapshot (FOR NO KEY UPDATE)",
    "chunk-lock": "a claim locks its chunk and passes by one that is locked (FOR NO KEY UPDATE SKIP LOCKED)",
    "dead": "only the claims of who was declared dead, or is unknown, are rescued (rescue_claims)",
    "recheck": "who beat since the leader looked is not declared dead (declare_dead: beat_at)",
    "death": "a heartbeat does not bring the dead back to life (beat_consumer: dead_at IS NULL)",
    "deadline": "nothing starts once the dead time has passed since the last heartbeat (Shared::may_start)",
    "sent": "that time counts from when the heartbeat was sent, not from when its answer came (Shared::beaten)",
    "drop": "who finds its registration gone takes away what has not started (Control::drop_unstarted)",
    "name": "what a claim brings in a name that was given up is not started (Books::is_current)",
    "under-way": "a claim whose answer is under way is not taken for a lost one (Reckoning::orphans)",
    "search": "the heartbeat finds claims whose answers were lost, and gives them back (Control::take_back)",
    "named": "a heartbeat names what runs under the claims that it knows, and no later one (consumer.last_no)",
    "numbers": "claim numbers are never used twice (Books::last_no)",
    "together": "what a handler writes and its task's completion are one transaction (complete_tx)",
    "told": "a handler whose statement finds no claim rolls its transaction back (TaskLost)",
    "verdict": "that a handler returned is no completion where its transaction was rolled back (Completer::take_back_tx)",
    "fresh": "a claim whose transaction was found rolled back gets a new number (settle_tx)",
    "own-books": "a task's own claim is on the books before it is asked for (Completer::new_no)",
    "own-numbers": "nor are those of tasks' own claims, which fall from -1 (Books::own_no)",
    "term": "only the leader declares dead, rescues and promotes (holder and term)",
}
#: Without it nothing goes wrong: it saves work and makes no move safe (invariant 7 of ARCHITECTURE.md).
HARMLESS: Final = frozenset({"term"})
#: What only scenes show in which handlers complete tasks in transactions.
OF_TRANSACTIONS: Final = frozenset({"together", "told", "verdict", "fresh", "own-books", "own-numbers"})

_OUTCOMES: Final = {COMPLETED: "complete_tasks", FAILED: "fail_tasks", BACK: "give_back_tasks"}


class Model:
    """The steps of one scene, with one guard taken out or none."""

    def __init__(self, scene: Scene, without: str | None = None) -> None:
        self.scene = scene
        self.without = without
        self._transactions = Transactions(self.has, scene.max_attempts)

    def normal(self, s: State) -> State:
        """Without heartbeats' answers that tell nothing, whenever they come."""
        if self.has("sent"):
            calls = tuple(call for call in s.calls if call.kind != "beat_consumer" or tells(s, call))
            if len(calls) != len(s.calls):
                s = s._replace(calls=calls)
        return renumbered(s)

    def has(self, guard: str) -> bool:
        """Whether this guard is in place."""
        return self.without != guard

    def first(self) -> State:
        """All tasks are ready, all workers registered."""
        scene = self.scene
        return State(
            tasks=(Task(ready=1),) * scene.tasks,
            claims=(),
            members=tuple(Member(w, 1, dead=False, silent=False, running=0) for w in range(scene.workers)),
            workers=(Worker(),) * scene.workers,
            calls=(),
            leaders=(Leader(),) * scene.leaders,
            holder=0,
            crashes=scene.crashes,
            losses=scene.losses,
            returns=scene.returns,
            deaths=scene.deaths,
            begins=scene.begins,
        )

    def steps(self, s: State) -> Iterator[Step]:
        """All that can happen next.

        Raises:
            Violation: one of these steps must never happen.
        """
        for w, worker in enumerate(s.workers):
            if worker.alive:
                yield from self._worker(s, w, worker)
        for at, call in enumerate(s.calls):
            if call.phase == ANSWERED:
                yield self._answer(s, at, call)
                if s.losses:
                    label = f"the answer to worker {call.worker + 1}'s {call.kind} is lost"
                    yield label, without_call(s._replace(losses=s.losses - 1), at)
                continue
            if call.kind in self._transactions.KINDS:
                label = f"the server runs the {call.kind} that worker {call.worker + 1} gave up"
                yield label, without_call(self._transactions.run(s, call), at)
            elif not is_locked(s, call.worker, call.name, call.no):
                yield self._server(s, at, call)
            if call.lost:
                # It never reached the server, or was rolled back with its connection.
                yield f"the {call.kind} that worker {call.worker + 1} gave up is not run", without_call(s, at)
            elif s.losses:
                label = (
                    f"worker {call.worker + 1} loses the connection of its {call.kind}, which the server may still run"
                )
                yield label, set_call(s._replace(losses=s.losses - 1), at, call._replace(lost=True))
        yield from self._transactions.steps(s)
        yield from self._upkeep(s)
        yield from pass_dead_time(s)

    # --- a worker ------------------------------------------------------------------------------------

    def _worker(self, s: State, w: int, worker: Worker) -> Iterator[Step]:  # noqa: C901, PLR0912 one process, all it can do
        who = f"worker {w + 1}"
        awaited = {call.kind for call in s.calls if call.worker == w and not call.lost}
        if s.crashes:
            yield f"{who} is killed", kill(s, w)
        if not worker.name:
            yield f"{who} registers anew (register_consumer)", self._register(s, w, worker)
        elif "beat_consumer" not in awaited:
            yield self._beat(s, w, worker)
        waits = [hold for hold in worker.holds if hold.state == WAITING]
        if worker.name and not worker.late and not waits and "claim_tasks" not in awaited:
            ready = sum(1 for task in s.tasks if task.ready)
            for most in range(1, ready + 1):
                call = Call("claim_tasks", w, worker.name, self._next_no(s, w, worker), ids=most)
                yield f"{who} sends claim_tasks (at most {most})", with_call(s, call)
        for hold in worker.holds:
            what = f"task {hold.task + 1}"
            if hold.state == WAITING:
                if not worker.late or not self.has("deadline"):
                    yield f"{who} starts {what}", self._start(s, w, worker, hold)
                if s.returns:
                    s2 = s._replace(returns=s.returns - 1)
                    yield f"{who} will not start {what}", set_worker(s2, w, put(worker, hold, BACK))
            elif hold.state == RUNNING and hold.part == SHARED:
                yield f"{who}'s handler returns from {what}", set_worker(s, w, put(worker, hold, COMPLETED))
                if self.scene.max_attempts > 1:
                    # With one attempt both are an end.
                    yield f"{who}'s handler raises in {what}", set_worker(s, w, put(worker, hold, FAILED))
        if not awaited & set(_OUTCOMES.values()):
            groups = sorted({(h.name, h.no, h.state, h.part == UNDONE) for h in worker.holds if h.state in _OUTCOMES})
            for name, no, state, undone in groups:
                ids = sum(1 << h.task for h in worker.holds if (h.name, h.no, h.state) == (name, no, state))
                if not is_locked(s, w, name, no):
                    yield from self._flush(s, Call(_OUTCOMES[state], w, name, no, ids, state, undone=undone))

    def _next_no(self, s: State, w: int, worker: Worker) -> int:
        """Numbers are counted down to those in use (`renumbered`), so the next free one is one that was never used."""
        mine = [hold.no for hold in worker.holds if hold.name == worker.name]
        if self.has("numbers"):
            mine += [c.no for c in s.claims if (c.worker, c.name) == (w, worker.name)]
            for call in s.calls:
                if (call.worker, call.name) == (w, worker.name):
                    mine += (call.no, *call.known)
        return max([0, *mine]) + 1

    def _register(self, s: State, w: int, worker: Worker) -> State:
        used = [m.name for m in s.members if m.worker == w] + [c.name for c in s.claims if c.worker == w]
        used += [h.name for h in worker.holds] + [c.name for c in s.calls if c.worker == w]
        used += [tx.name for tx in s.transactions if tx.worker == w]
        name = max(used, default=0) + 1
        member = Member(w, name, dead=False, silent=False, running=0)
        s = s._replace(members=(*s.members, member))
        return set_worker(s, w, worker._replace(name=name, late=False))

    def _flush(self, s: State, call: Call) -> Iterator[Step]:
        """A result is sent. It waits in the worker until it is run, so that it lies on the way is no state of its own."""
        label = f"worker {call.worker + 1} sends {call.kind} for {text_of(call.ids)}"
        at, sent = len(s.calls), with_call(s, call)
        run, after = self._server(sent, at, call)
        yield f"{label}; {run}", after
        if s.losses:
            s = s._replace(losses=s.losses - 1)
            sent = with_call(s, call._replace(lost=True))
            yield f"{label} and loses the connection; the server may still run it", sent
            if self.has("lock"):
                run, after = self._server(sent, at, call._replace(lost=True))
                yield f"{label}; {run}; its answer is lost", after

    def _beat(self, s: State, w: int, worker: Worker) -> Step:
        """A heartbeat is sent and run. Sent earlier it would promise less: its deadline counts from then."""
        label = f"worker {w + 1} sends beat_consumer, naming {text_of(running_of(worker))}"
        for n, member in enumerate(s.members):
            if (member.worker, member.name) == (w, worker.name) and not (member.dead and self.has("death")):
                under_way = [
                    c.no
                    for c in s.calls
                    if (c.kind, c.worker, c.name, c.lost) == ("claim_tasks", w, worker.name, False)
                ]
                known = {hold.no for hold in worker.holds if hold.name == worker.name}
                if self.has("own-books"):
                    known.update(n for h in worker.holds if h.name == worker.name for n in (h.own, h.fresh))
                known.update(under_way if self.has("under-way") else ())
                lost = {c.no for c in s.claims if (c.worker, c.name) == (w, worker.name)} - known
                members = replaced(s.members, n, member._replace(silent=False, running=running_of(worker)))
                call = Call("beat_consumer", w, worker.name, 0, phase=ANSWERED, known=tuple(sorted(lost)))
                claims = tuple(
                    c._replace(named=c.ids & running_of(worker)) if (c.worker, c.name) == (w, worker.name) else c
                    for c in s.claims
                )
                return f"{label}: it lives", with_call(s._replace(members=members, claims=claims), call)
        return f"{label}: it is dead", with_call(s, Call("beat_consumer", w, worker.name, 0, phase=ANSWERED, dead=True))

    def _start(self, s: State, w: int, worker: Worker, hold: Hold) -> State:
        bit = 1 << hold.task
        for at, claim in enumerate(s.claims):
            if (claim.worker, claim.name, claim.no) == (w, hold.name, hold.no) and claim.ids & bit:
                if claim.started & bit:
                    raise Violation(f"task {hold.task + 1} starts twice under one claim")
                claims = replaced(s.claims, at, claim._replace(started=claim.started | bit))
                return set_worker(s._replace(claims=claims), w, put(worker, hold, RUNNING))
        raise Violation(
            f"task {hold.task + 1} starts in worker {w + 1}, whose claim no longer holds it: another may run it"
        )

    # --- the server ----------------------------------------------------------------------------------

    def _server(self, s: State, at: int, call: Call) -> Step:
        label = f"the server runs {call.kind} of worker {call.worker + 1}"
        if call.kind == "claim_tasks":
            if call.phase == SENT and not self.has("chunk-lock"):
                ids = first_ready(s, call.ids)
                return f"{label}: its snapshot shows {text_of(ids)}", set_call(
                    s, at, call._replace(ids=ids, phase=SEEN)
                )
            ids = first_ready(s, call.ids) if call.phase == SENT else call.ids
            return f"{label}: it takes {text_of(ids)}", self._claim(s, at, call, ids)
        held = held_by(s, call)
        if call.phase == SENT and not self.has("lock"):
            seen = call._replace(phase=SEEN, known=(held,))
            return f"{label}: its snapshot shows {text_of(held)} in the claim", set_call(s, at, seen)
        if call.phase == SEEN:
            [held] = call.known
        return f"{label}: the claim holds {text_of(call.ids & held)}", self._end(s, at, call, held)

    def _claim(self, s: State, at: int, call: Call, ids: int) -> State:
        # Numbers used twice: the primary key refuses the second.
        if not ids or any((c.worker, c.name, c.no) == (call.worker, call.name, call.no) for c in s.claims):
            return without_call(s, at)
        tasks = list(s.tasks)
        for task in tasks_of(ids):
            tasks[task] = tasks[task]._replace(ready=max(0, tasks[task].ready - 1))
        claims = (*s.claims, Claim(call.worker, call.name, call.no, ids, 0))
        return set_call(s._replace(tasks=tuple(tasks), claims=claims), at, call._replace(ids=ids, phase=ANSWERED))

    def _end(self, s: State, at: int, call: Call, held: int) -> State:  # noqa: C901 one statement, whole
        """A result: of ``held``, what the claim's row holds as it was locked (or seen, without the lock)."""
        counts = call.ids & held if self.has("fence") else call.ids
        tasks = list(s.tasks)
        rows = list(s.claims)
        mine = [n for n, c in enumerate(rows) if (c.worker, c.name, c.no) == (call.worker, call.name, call.no)]
        started = rows[mine[0]].started if mine else 0
        for task in tasks_of(counts):
            found, bit = tasks[task], 1 << task
            if mine and rows[mine[0]].ids & bit:
                if call.state == BACK and started & bit:
                    raise Violation(f"task {task + 1} is given back as not started, and runs")
                if call.state != BACK and not started & bit:
                    raise Violation(f"task {task + 1} ends without a start under its claim")
                if call.undone:
                    raise Violation(f"task {task + 1} completes without its effects: their transaction was rolled back")
            if call.state == BACK:
                tasks[task] = found._replace(ready=min(2, found.ready + 1))
            elif call.state == FAILED and found.attempts + 1 < self.scene.max_attempts:
                tasks[task] = found._replace(delayed=min(2, found.delayed + 1), attempts=found.attempts + 1)
            else:
                tasks[task] = found._replace(ended=found.ended + 1, attempts=found.attempts + (call.state != BACK))
        for n in mine:
            rest = held & ~call.ids
            if rest:
                rows[n] = rows[n]._replace(ids=rest, started=started & rest)
            elif held:
                del rows[n]
        s = without_call(s._replace(tasks=tuple(tasks), claims=tuple(rows)), at)
        if call.lost:
            return s
        worker = s.workers[call.worker]
        done = (call.name, call.no, call.state)
        holds = tuple(h for h in worker.holds if (h.name, h.no, h.state) != done or not call.ids >> h.task & 1)
        return set_worker(s, call.worker, worker._replace(holds=holds))

    # --- answers -------------------------------------------------------------------------------------

    def _answer(self, s: State, at: int, call: Call) -> Step:
        w, worker = call.worker, s.workers[call.worker]
        label = f"worker {w + 1} hears of its {call.kind}"
        s = without_call(s, at)
        if call.kind == "claim_tasks":
            if worker.name != call.name and self.has("name"):
                return f"{label}, in a name that it gave up: left to others", s
            new = (Hold(call.name, call.no, task, WAITING) for task in tasks_of(call.ids))
            return f"{label}: {text_of(call.ids)} may start", set_worker(
                s, w, worker._replace(holds=(*worker.holds, *new))
            )
        if call.dead:
            holds = tuple(h for h in worker.holds if h.state != WAITING) if self.has("drop") else worker.holds
            worker = worker._replace(name=0, late=True, holds=holds)
            return f"{label}: it is dead, and drops what has not started", set_worker(s, w, worker)
        holds = worker.holds
        if self.has("search"):
            # read_claims: what those still hold now.
            for claim in s.claims:
                if (claim.worker, claim.name) == (w, call.name) and claim.no in call.known:
                    holds += tuple(Hold(call.name, claim.no, task, BACK) for task in tasks_of(claim.ids))
        worker = worker._replace(late=call.late and self.has("sent"), holds=holds)
        return f"{label}: it lives", set_worker(s, w, worker)

    # --- upkeep --------------------------------------------------------------------------------------

    def _upkeep(self, s: State) -> Iterator[Step]:
        silent = tuple((m.worker, m.name) for m in s.members if m.silent and not m.dead)
        for number, leader in enumerate(s.leaders):
            who = f"leader {number + 1}"
            if number != s.holder:
                yield f"{who} takes the lease (tick)", set_leader(s._replace(holder=number), number, Leader())
                if self.has("term"):
                    # Whatever it sends is asked for its term, and does nothing.
                    if leader.silent:
                        yield f"{who} is not heard", set_leader(s, number, Leader())
                    continue
            seen = leader.silent
            if self.has("recheck") and len(s.leaders) == 1:
                # What it saw before is of no matter then: the statement asks again.
                seen = silent
            elif silent and seen != silent:
                yield f"{who} looks (tick): silent are {names_of(silent)}", set_leader(s, number, Leader(silent))
            found = {(m.worker, m.name) for m in s.members if not m.dead and (m.silent or not self.has("recheck"))}
            found &= set(seen)
            cost = sum(1 for worker, _ in found if s.workers[worker].alive)
            if seen and cost <= s.deaths:
                members = tuple(m._replace(dead=m.dead or (m.worker, m.name) in found) for m in s.members)
                s2 = s._replace(members=members, deaths=s.deaths - cost)
                yield f"{who} sends declare_dead: {names_of(tuple(sorted(found)))}", set_leader(s2, number, Leader())
        yield from self._save(s)

    def _save(self, s: State) -> Iterator[Step]:
        alive = {(m.worker, m.name) for m in s.members if not m.dead}
        for at, claim in enumerate(s.claims):
            if is_locked(s, claim.worker, claim.name, claim.no):
                continue
            if (claim.worker, claim.name) not in alive or not self.has("dead"):
                yield f"rescue_claims puts back {text_of(claim.ids)} of worker {claim.worker + 1}", self._rescue(s, at)
        holding = {(c.worker, c.name) for c in s.claims}
        kept = tuple(m for m in s.members if not m.dead or (m.worker, m.name) in holding)
        if len(kept) != len(s.members):
            yield "forget_consumers forgets the dead that hold nothing", s._replace(members=kept)
        due = [task for task in s.tasks if task.delayed]
        if due:
            tasks = tuple(t._replace(delayed=0, ready=min(2, t.ready + t.delayed)) for t in s.tasks)
            yield "promote_tasks makes ready what waited for its retry", s._replace(tasks=tasks)

    def _rescue(self, s: State, at: int) -> State:
        claim = s.claims[at]
        ran = next((m.running for m in s.members if (m.worker, m.name) == (claim.worker, claim.name)), 0)
        tasks = list(s.tasks)
        for task in tasks_of(claim.ids):
            found, bit = tasks[task], 1 << task
            charge = 1 if (claim.named if self.has("named") else ran) & bit else 0
            if charge and not claim.started & bit:
                raise Violation(f"task {task + 1} is charged for a run that never started")
            attempts = found.attempts + charge
            if attempts >= self.scene.max_attempts:
                tasks[task] = found._replace(attempts=attempts, ended=found.ended + 1)
            else:
                tasks[task] = found._replace(attempts=attempts, ready=min(2, found.ready + 1))
        return s._replace(tasks=tuple(tasks), claims=s.claims[:at] + s.claims[at + 1 :])
