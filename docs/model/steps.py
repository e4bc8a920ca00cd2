"""The steps of the protocol by which tasks are claimed, run, ended and rescued: states, and all that can happen in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

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
    "term": "only the leader declares dead, rescues and promotes (holder and term)",
}
#: Without it nothing goes wrong: it saves work and makes no move safe (invariant 7 of ARCHITECTURE.md).
HARMLESS: Final = frozenset({"term"})

SENT, SEEN, ANSWERED = range(3)
WAITING, RUNNING, COMPLETED, FAILED, BACK = range(5)
_OUTCOMES: Final = {COMPLETED: "complete_tasks", FAILED: "fail_tasks", BACK: "give_back_tasks"}


class Task(NamedTuple):
    """Where a task is, as counts, so that a broken model can put it into two places. A claim's hold is in `Claim`."""

    ready: int = 0
    delayed: int = 0
    ended: int = 0
    attempts: int = 0


class Claim(NamedTuple):
    """A row of ``claim``. Sets of tasks are bits."""

    worker: int
    name: int
    no: int
    ids: int
    started: int
    """Which of them were started under it: known to nobody, for the properties alone."""
    named: int = 0
    """Which of them the last heartbeat named as running: none, of a claim that it did not know (``no`` above ``consumer.last_no``)."""


class Member(NamedTuple):
    """A row of ``consumer``: a registration (``name``) of a worker."""

    worker: int
    name: int
    dead: bool
    silent: bool
    """Its last heartbeat is older than the dead time."""
    running: int


class Hold(NamedTuple):
    """A task in a worker's memory."""

    name: int
    no: int
    task: int
    state: int


class Worker(NamedTuple):
    """A process. It may stand still between any two of its steps, for any time."""

    alive: bool = True
    name: int = 1
    """Its registration; 0: it was found gone, and there is no new one yet."""
    late: bool = False
    """The dead time has passed since it sent the last heartbeat that was answered."""
    holds: tuple[Hold, ...] = ()


class Call(NamedTuple):
    """A statement under way."""

    kind: str
    worker: int
    name: int
    no: int
    """Of a claim or result: the claim's number. Of a heartbeat: the last number that was settled when it was sent."""
    ids: int = 0
    """Of a claim: at most so many, then what it took. Of a result: of what. Of a heartbeat: what runs."""
    state: int = 0
    phase: int = SENT
    lost: bool = False
    """Nobody waits for its answer any more; the server may still run it, at any time."""
    late: bool = False
    """Of a heartbeat: the dead time has passed since it was sent. Of its answer: see ``dead``."""
    dead: bool = False
    known: tuple[int, ...] = ()
    """Of a heartbeat: the claims on the books when it was sent; of its answer: those whose answers were lost."""


class Leader(NamedTuple):
    """A process that does upkeep: what it has seen, and not done yet."""

    silent: tuple[tuple[int, int], ...] = ()


class State(NamedTuple):
    """All there is."""

    tasks: tuple[Task, ...]
    claims: tuple[Claim, ...]
    members: tuple[Member, ...]
    workers: tuple[Worker, ...]
    calls: tuple[Call, ...]
    leaders: tuple[Leader, ...]
    holder: int
    crashes: int
    losses: int
    returns: int
    deaths: int


class Scene(NamedTuple):
    """Bounds of one search: how many there are of each, and how often each fault strikes at most."""

    name: str
    tasks: int = 1
    workers: int = 2
    leaders: int = 1
    max_attempts: int = 2
    crashes: int = 0
    losses: int = 0
    """Connections that break with a statement under way."""
    returns: int = 0
    """Claimed tasks that a worker decides not to start."""
    deaths: int = 1
    """Living workers declared dead. Silences that nobody declares are not bounded."""


SCENES: Final = (
    Scene("a worker that is declared dead", max_attempts=1),
    Scene("a crash, and a retry", crashes=1, deaths=0),
    Scene("a lost connection, and a task that is not started", losses=1, returns=1, max_attempts=1, deaths=0),
    Scene("a lost connection, and a retry", losses=1, deaths=0),
    Scene("two tasks of one chunk", tasks=2, max_attempts=1, deaths=0),
    Scene("two leaders, and one worker", workers=1, leaders=2, max_attempts=1),
)
#: Faults together: minutes.
WIDE: Final = (
    Scene("a lost connection, and a worker that is declared dead", losses=1, max_attempts=1),
    Scene("a crash, a worker that is declared dead, and a retry", crashes=1),
    Scene("two tasks of one chunk, and a lost connection", tasks=2, losses=1, max_attempts=1, deaths=0),
)

Step: TypeAlias = tuple[str, State]


class Violation(Exception):  # noqa: N818 it is what is looked for
    """A property does not hold."""


# --- steps of the database: each is one statement, whole, as row locks make it -----------------------


def _tasks(ids: int) -> Iterator[int]:
    task = 0
    while ids:
        if ids & 1:
            yield task
        ids >>= 1
        task += 1


def _text(ids: int) -> str:
    return ", ".join(f"task {task + 1}" for task in _tasks(ids)) or "nothing"


class Model:
    """The steps of one scene, with one guard taken out or none."""

    def __init__(self, scene: Scene, without: str | None = None) -> None:
        self.scene = scene
        self.without = without

    def normal(self, s: State) -> State:
        """Without heartbeats' answers that tell nothing, whenever they come."""
        if self.has("sent"):
            calls = tuple(call for call in s.calls if call.kind != "beat_consumer" or _tells(s, call))
            if len(calls) != len(s.calls):
                s = s._replace(calls=calls)
        return _renumbered(s)

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
                    yield label, _without(s._replace(losses=s.losses - 1), at)
                continue
            yield self._server(s, at, call)
            if call.lost:
                # It never reached the server, or was rolled back with its connection.
                yield f"the {call.kind} that worker {call.worker + 1} gave up is not run", _without(s, at)
            elif s.losses:
                label = (
                    f"worker {call.worker + 1} loses the connection of its {call.kind}, which the server may still run"
                )
                yield label, _set_call(s._replace(losses=s.losses - 1), at, call._replace(lost=True))
        yield from self._upkeep(s)
        yield from _time(s)

    # --- a worker ------------------------------------------------------------------------------------

    def _worker(self, s: State, w: int, worker: Worker) -> Iterator[Step]:  # noqa: C901, PLR0912 one process, all it can do
        who = f"worker {w + 1}"
        awaited = {call.kind for call in s.calls if call.worker == w and not call.lost}
        if s.crashes:
            yield f"{who} is killed", _kill(s, w)
        if not worker.name:
            yield f"{who} registers anew (register_consumer)", self._register(s, w, worker)
        elif "beat_consumer" not in awaited:
            yield self._beat(s, w, worker)
        waits = [hold for hold in worker.holds if hold.state == WAITING]
        if worker.name and not worker.late and not waits and "claim_tasks" not in awaited:
            ready = sum(1 for task in s.tasks if task.ready)
            for most in range(1, ready + 1):
                call = Call("claim_tasks", w, worker.name, self._next_no(s, w, worker), ids=most)
                yield f"{who} sends claim_tasks (at most {most})", _with(s, call)
        for hold in worker.holds:
            what = f"task {hold.task + 1}"
            if hold.state == WAITING:
                if not worker.late or not self.has("deadline"):
                    yield f"{who} starts {what}", self._start(s, w, worker, hold)
                if s.returns:
                    s2 = s._replace(returns=s.returns - 1)
                    yield f"{who} will not start {what}", _set_worker(s2, w, _put(worker, hold, BACK))
            elif hold.state == RUNNING:
                yield f"{who}'s handler returns from {what}", _set_worker(s, w, _put(worker, hold, COMPLETED))
                if self.scene.max_attempts > 1:
                    # With one attempt both are an end.
                    yield f"{who}'s handler raises in {what}", _set_worker(s, w, _put(worker, hold, FAILED))
        if not awaited & set(_OUTCOMES.values()):
            groups = sorted({(h.name, h.no, h.state) for h in worker.holds if h.state in _OUTCOMES})
            for name, no, state in groups:
                ids = sum(1 << h.task for h in worker.holds if (h.name, h.no, h.state) == (name, no, state))
                yield from self._flush(s, Call(_OUTCOMES[state], w, name, no, ids, state))

    def _next_no(self, s: State, w: int, worker: Worker) -> int:
        """Numbers are counted down to those in use (`_renumbered`), so the next free one is one that was never used."""
        mine = [hold.no for hold in worker.holds if hold.name == worker.name]
        if self.has("numbers"):
            mine += [c.no for c in s.claims if (c.worker, c.name) == (w, worker.name)]
            for call in s.calls:
                if (call.worker, call.name) == (w, worker.name):
                    mine += (call.no, *call.known)
        return max(mine, default=0) + 1

    def _register(self, s: State, w: int, worker: Worker) -> State:
        used = [m.name for m in s.members if m.worker == w] + [c.name for c in s.claims if c.worker == w]
        used += [h.name for h in worker.holds] + [c.name for c in s.calls if c.worker == w]
        name = max(used, default=0) + 1
        member = Member(w, name, dead=False, silent=False, running=0)
        s = s._replace(members=(*s.members, member))
        return _set_worker(s, w, worker._replace(name=name, late=False))

    def _flush(self, s: State, call: Call) -> Iterator[Step]:
        """A result is sent. It waits in the worker until it is run, so that it lies on the way is no state of its own."""
        label = f"worker {call.worker + 1} sends {call.kind} for {_text(call.ids)}"
        at, sent = len(s.calls), _with(s, call)
        run, after = self._server(sent, at, call)
        yield f"{label}; {run}", after
        if s.losses:
            s = s._replace(losses=s.losses - 1)
            sent = _with(s, call._replace(lost=True))
            yield f"{label} and loses the connection; the server may still run it", sent
            if self.has("lock"):
                run, after = self._server(sent, at, call._replace(lost=True))
                yield f"{label}; {run}; its answer is lost", after

    def _beat(self, s: State, w: int, worker: Worker) -> Step:
        """A heartbeat is sent and run. Sent earlier it would promise less: its deadline counts from then."""
        label = f"worker {w + 1} sends beat_consumer, naming {_text(_running(worker))}"
        for n, member in enumerate(s.members):
            if (member.worker, member.name) == (w, worker.name) and not (member.dead and self.has("death")):
                under_way = [
                    c.no
                    for c in s.calls
                    if (c.kind, c.worker, c.name, c.lost) == ("claim_tasks", w, worker.name, False)
                ]
                known = {hold.no for hold in worker.holds if hold.name == worker.name}
                known.update(under_way if self.has("under-way") else ())
                lost = {c.no for c in s.claims if (c.worker, c.name) == (w, worker.name)} - known
                members = _replaced(s.members, n, member._replace(silent=False, running=_running(worker)))
                call = Call("beat_consumer", w, worker.name, 0, phase=ANSWERED, known=tuple(sorted(lost)))
                claims = tuple(
                    c._replace(named=c.ids & _running(worker)) if (c.worker, c.name) == (w, worker.name) else c
                    for c in s.claims
                )
                return f"{label}: it lives", _with(s._replace(members=members, claims=claims), call)
        return f"{label}: it is dead", _with(s, Call("beat_consumer", w, worker.name, 0, phase=ANSWERED, dead=True))

    def _start(self, s: State, w: int, worker: Worker, hold: Hold) -> State:
        bit = 1 << hold.task
        for at, claim in enumerate(s.claims):
            if (claim.worker, claim.name, claim.no) == (w, hold.name, hold.no) and claim.ids & bit:
                if claim.started & bit:
                    raise Violation(f"task {hold.task + 1} starts twice under one claim")
                claims = _replaced(s.claims, at, claim._replace(started=claim.started | bit))
                return _set_worker(s._replace(claims=claims), w, _put(worker, hold, RUNNING))
        raise Violation(
            f"task {hold.task + 1} starts in worker {w + 1}, whose claim no longer holds it: another may run it"
        )

    # --- the server ----------------------------------------------------------------------------------

    def _server(self, s: State, at: int, call: Call) -> Step:
        label = f"the server runs {call.kind} of worker {call.worker + 1}"
        if call.kind == "claim_tasks":
            if call.phase == SENT and not self.has("chunk-lock"):
                ids = _first_ready(s, call.ids)
                return f"{label}: its snapshot shows {_text(ids)}", _set_call(s, at, call._replace(ids=ids, phase=SEEN))
            ids = _first_ready(s, call.ids) if call.phase == SENT else call.ids
            return f"{label}: it takes {_text(ids)}", self._claim(s, at, call, ids)
        held = _held(s, call)
        if call.phase == SENT and not self.has("lock"):
            seen = call._replace(phase=SEEN, known=(held,))
            return f"{label}: its snapshot shows {_text(held)} in the claim", _set_call(s, at, seen)
        if call.phase == SEEN:
            [held] = call.known
        return f"{label}: the claim holds {_text(call.ids & held)}", self._end(s, at, call, held)

    def _claim(self, s: State, at: int, call: Call, ids: int) -> State:
        # Numbers used twice: the primary key refuses the second.
        if not ids or any((c.worker, c.name, c.no) == (call.worker, call.name, call.no) for c in s.claims):
            return _without(s, at)
        tasks = list(s.tasks)
        for task in _tasks(ids):
            tasks[task] = tasks[task]._replace(ready=max(0, tasks[task].ready - 1))
        claims = (*s.claims, Claim(call.worker, call.name, call.no, ids, 0))
        return _set_call(s._replace(tasks=tuple(tasks), claims=claims), at, call._replace(ids=ids, phase=ANSWERED))

    def _end(self, s: State, at: int, call: Call, held: int) -> State:  # noqa: C901 one statement, whole
        """A result: of ``held``, what the claim's row holds as it was locked (or seen, without the lock)."""
        counts = call.ids & held if self.has("fence") else call.ids
        tasks = list(s.tasks)
        rows = list(s.claims)
        mine = [n for n, c in enumerate(rows) if (c.worker, c.name, c.no) == (call.worker, call.name, call.no)]
        started = rows[mine[0]].started if mine else 0
        for task in _tasks(counts):
            found, bit = tasks[task], 1 << task
            if mine and rows[mine[0]].ids & bit:
                if call.state == BACK and started & bit:
                    raise Violation(f"task {task + 1} is given back as not started, and runs")
                if call.state != BACK and not started & bit:
                    raise Violation(f"task {task + 1} ends without a start under its claim")
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
        s = _without(s._replace(tasks=tuple(tasks), claims=tuple(rows)), at)
        if call.lost:
            return s
        worker = s.workers[call.worker]
        done = (call.name, call.no, call.state)
        holds = tuple(h for h in worker.holds if (h.name, h.no, h.state) != done or not call.ids >> h.task & 1)
        return _set_worker(s, call.worker, worker._replace(holds=holds))

    # --- answers -------------------------------------------------------------------------------------

    def _answer(self, s: State, at: int, call: Call) -> Step:
        w, worker = call.worker, s.workers[call.worker]
        label = f"worker {w + 1} hears of its {call.kind}"
        s = _without(s, at)
        if call.kind == "claim_tasks":
            if worker.name != call.name and self.has("name"):
                return f"{label}, in a name that it gave up: left to others", s
            new = (Hold(call.name, call.no, task, WAITING) for task in _tasks(call.ids))
            return f"{label}: {_text(call.ids)} may start", _set_worker(
                s, w, worker._replace(holds=(*worker.holds, *new))
            )
        if call.dead:
            holds = tuple(h for h in worker.holds if h.state != WAITING) if self.has("drop") else worker.holds
            worker = worker._replace(name=0, late=True, holds=holds)
            return f"{label}: it is dead, and drops what has not started", _set_worker(s, w, worker)
        holds = worker.holds
        if self.has("search"):
            # read_claims: what those still hold now.
            for claim in s.claims:
                if (claim.worker, claim.name) == (w, call.name) and claim.no in call.known:
                    holds += tuple(Hold(call.name, claim.no, task, BACK) for task in _tasks(claim.ids))
        worker = worker._replace(late=call.late and self.has("sent"), holds=holds)
        return f"{label}: it lives", _set_worker(s, w, worker)

    # --- upkeep --------------------------------------------------------------------------------------

    def _upkeep(self, s: State) -> Iterator[Step]:
        silent = tuple((m.worker, m.name) for m in s.members if m.silent and not m.dead)
        for number, leader in enumerate(s.leaders):
            who = f"leader {number + 1}"
            if number != s.holder:
                yield f"{who} takes the lease (tick)", _set_leader(s._replace(holder=number), number, Leader())
                if self.has("term"):
                    # Whatever it sends is asked for its term, and does nothing.
                    if leader.silent:
                        yield f"{who} is not heard", _set_leader(s, number, Leader())
                    continue
            seen = leader.silent
            if self.has("recheck") and len(s.leaders) == 1:
                # What it saw before is of no matter then: the statement asks again.
                seen = silent
            elif silent and seen != silent:
                yield f"{who} looks (tick): silent are {_names(silent)}", _set_leader(s, number, Leader(silent))
            found = {(m.worker, m.name) for m in s.members if not m.dead and (m.silent or not self.has("recheck"))}
            found &= set(seen)
            cost = sum(1 for worker, _ in found if s.workers[worker].alive)
            if seen and cost <= s.deaths:
                members = tuple(m._replace(dead=m.dead or (m.worker, m.name) in found) for m in s.members)
                s2 = s._replace(members=members, deaths=s.deaths - cost)
                yield f"{who} sends declare_dead: {_names(tuple(sorted(found)))}", _set_leader(s2, number, Leader())
        yield from self._save(s)

    def _save(self, s: State) -> Iterator[Step]:
        alive = {(m.worker, m.name) for m in s.members if not m.dead}
        for at, claim in enumerate(s.claims):
            if (claim.worker, claim.name) not in alive or not self.has("dead"):
                yield f"rescue_claims puts back {_text(claim.ids)} of worker {claim.worker + 1}", self._rescue(s, at)
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
        for task in _tasks(claim.ids):
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


# --- parts of states ---------------------------------------------------------------------------------


def _time(s: State) -> Iterator[Step]:
    """The dead time passes with no heartbeat stored or answered: for everyone, since clocks run alike."""
    later = s._replace(
        workers=tuple(w._replace(late=True) if w.alive else w for w in s.workers),
        members=tuple(m._replace(silent=True) for m in s.members),
        calls=tuple(c._replace(late=True) if c.kind == "beat_consumer" else c for c in s.calls),
    )
    if later != s:
        yield "the dead time passes", later


def _kill(s: State, w: int) -> State:
    calls = tuple(
        call._replace(lost=True) if call.worker == w else call
        for call in s.calls
        if call.worker != w or call.phase != ANSWERED
    )
    s = s._replace(calls=calls, crashes=s.crashes - 1)
    return _set_worker(s, w, Worker(alive=False, name=0))


def _tells(s: State, call: Call) -> bool:
    worker = s.workers[call.worker]
    return worker.name == call.name and (call.dead or bool(call.known) or call.late != worker.late)


def _running(worker: Worker) -> int:
    return sum(1 << h.task for h in worker.holds if h.state == RUNNING and h.name == worker.name)


def _held(s: State, call: Call) -> int:
    for claim in s.claims:
        if (claim.worker, claim.name, claim.no) == (call.worker, call.name, call.no):
            return claim.ids
    return 0


def _first_ready(s: State, most: int) -> int:
    ids = 0
    for n, task in enumerate(s.tasks):
        if task.ready and most:
            ids |= 1 << n
            most -= 1
    return ids


def _put(worker: Worker, hold: Hold, state: int) -> Worker:
    return worker._replace(holds=tuple(h._replace(state=state) if h == hold else h for h in worker.holds))


def _names(names: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"worker {worker + 1}" for worker, _ in names) or "nobody"


def _replaced(rows: tuple[Claim, ...] | tuple[Member, ...], at: int, row: Claim | Member) -> tuple:  # type: ignore[type-arg]
    return (*rows[:at], row, *rows[at + 1 :])


def _with(s: State, call: Call) -> State:
    return s._replace(calls=(*s.calls, call))


def _without(s: State, at: int) -> State:
    return s._replace(calls=s.calls[:at] + s.calls[at + 1 :])


def _set_call(s: State, at: int, call: Call) -> State:
    if call.lost and call.phase == ANSWERED:
        return _without(s, at)
    return s._replace(calls=(*s.calls[:at], call, *s.calls[at + 1 :]))


def _set_worker(s: State, w: int, worker: Worker) -> State:
    return s._replace(workers=(*s.workers[:w], worker, *s.workers[w + 1 :]))


def _set_leader(s: State, number: int, leader: Leader) -> State:
    return s._replace(leaders=(*s.leaders[:number], leader, *s.leaders[number + 1 :]))


def check(s: State, max_attempts: int) -> None:
    """What holds in every state.

    Raises:
        Violation: it does not.
    """
    held = 0
    for claim in s.claims:
        held |= claim.ids
    for n, task in enumerate(s.tasks):
        if task.ended > 1:
            raise Violation(f"task {n + 1} ends twice")
        if not (task.ready or task.delayed or task.ended or held >> n & 1):
            raise Violation(f"task {n + 1} is lost: it is in no table")
        if task.attempts > max_attempts:
            raise Violation(f"task {n + 1} is charged for more attempts than it has")


def _renumbered(s: State) -> State:
    """With registrations and claim numbers counted down to those that anything still names, and all sets in order.

    They only grow, and are only compared with each other: what they are is of no matter, what their order is, is.
    """
    names: set[tuple[int, int]] = {(m.worker, m.name) for m in s.members}
    numbers: set[tuple[int, int, int]] = set()
    for claim in s.claims:
        names.add((claim.worker, claim.name))
        numbers.add((claim.worker, claim.name, claim.no))
    for call in s.calls:
        names.add((call.worker, call.name))
        numbers.add((call.worker, call.name, call.no))
        if call.kind == "beat_consumer":
            numbers.update((call.worker, call.name, no) for no in call.known)
    for w, worker in enumerate(s.workers):
        if worker.name:
            names.add((w, worker.name))
        for hold in worker.holds:
            names.add((w, hold.name))
            numbers.add((w, hold.name, hold.no))
    name = _ranks(names)
    no = _ranks(numbers)
    return s._replace(
        claims=tuple(sorted(c._replace(name=name[c.worker, c.name], no=no[c.worker, c.name, c.no]) for c in s.claims)),
        members=tuple(sorted(m._replace(name=name[m.worker, m.name], silent=m.silent or m.dead) for m in s.members)),
        workers=tuple(
            worker._replace(
                name=name[w, worker.name] if worker.name else 0,
                holds=tuple(sorted(h._replace(name=name[w, h.name], no=no[w, h.name, h.no]) for h in worker.holds)),
            )
            for w, worker in enumerate(s.workers)
        ),
        calls=tuple(
            sorted(
                c._replace(
                    name=name[c.worker, c.name],
                    no=no[c.worker, c.name, c.no],
                    known=tuple(no[c.worker, c.name, n] for n in c.known) if c.kind == "beat_consumer" else c.known,
                )
                for c in s.calls
            )
        ),
        leaders=tuple(Leader(tuple(sorted((w, name.get((w, n), 0)) for w, n in x.silent))) for x in s.leaders),
    )


def _ranks(
    numbers: set[tuple[int, ...]] | set[tuple[int, int]] | set[tuple[int, int, int]],
) -> dict[tuple[int, ...], int]:
    """By all but the last: the how manieth it is."""
    ranks: dict[tuple[int, ...], int] = {}
    counts: dict[tuple[int, ...], int] = {}
    for number in sorted(numbers):
        if number[-1] == 0:
            ranks[number] = 0
            continue
        counts[number[:-1]] = counts.get(number[:-1], 0) + 1
        ranks[number] = counts[number[:-1]]
    return ranks


def canonical(s: State) -> State:
    """Workers are alike: of two states that differ by who is who, one."""
    order = sorted(range(len(s.workers)), key=lambda w: s.workers[w])
    if order == list(range(len(order))):
        return s
    new = {old: number for number, old in enumerate(order)}
    return s._replace(
        claims=tuple(sorted(c._replace(worker=new[c.worker]) for c in s.claims)),
        members=tuple(sorted(m._replace(worker=new[m.worker]) for m in s.members)),
        workers=tuple(s.workers[old] for old in order),
        calls=tuple(sorted(c._replace(worker=new[c.worker]) for c in s.calls)),
        leaders=tuple(Leader(tuple(sorted((new[w], n) for w, n in x.silent))) for x in s.leaders),
    )
