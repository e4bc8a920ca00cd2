"""States of the model: the rows of the database, the workers and what is under way; what holds in each, and which are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

SENT, SEEN, ANSWERED = range(3)
#: The last two are put aside: the handler has ended, and a transaction decides.
WAITING, RUNNING, COMPLETED, FAILED, BACK, RETURNED, RAISED = range(7)
#: Of a task whose handler completes it in a transaction: it has no claim of its own, is to get one, has one; a statement was sent that
#: completes it; the transaction was found rolled back, and the claim is there.
SHARED, PARTING, ALONE, BEGUN, UNDONE = range(5)


class Task(NamedTuple):
    """Where a task is, as counts, so that a broken model can put it into two places. A claim's hold is in `Claim`."""

    ready: int = 0
    delayed: int = 0
    ended: int = 0
    attempts: int = 0
    effects: int = 0
    """How often there is what its handlers wrote in transactions that were to complete it."""


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
    part: int = SHARED
    own: int = 0
    """The number of its own claim, which holds it alone: below 0."""
    fresh: int = 0
    """The number that this claim is to get where the transaction is found rolled back."""


class Transaction(NamedTuple):
    """A handler's transaction that is to complete its task, with what the handler wrote: until it is committed or rolled back."""

    worker: int
    name: int
    no: int
    """Of the claim that its statement looks for."""
    task: int
    written: bool = False
    """The statement has found the claim, deleted it and written the completion: nobody sees that yet, and who wants the row waits."""
    judged: bool = False
    """Its worker was told that it was rolled back."""


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
    """Of a heartbeat: the claims on the books when it was sent; of its answer: those whose answers were lost. Of part_claims: the
    number of the claim to be made; of settle_tx: the one that it is to get."""
    undone: bool = False
    """Of a completion: the transaction that was to do it was rolled back."""


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
    transactions: tuple[Transaction, ...] = ()
    begins: int = 0


Step: TypeAlias = tuple[str, State]

#: Statements under way that know claims by their numbers.
_NUMBERED: Final = frozenset({"beat_consumer", "part_claims", "settle_tx"})


class Violation(Exception):  # noqa: N818 it is what is looked for
    """A property does not hold."""


def tasks_of(ids: int) -> Iterator[int]:
    """The tasks whose bits are set."""
    task = 0
    while ids:
        if ids & 1:
            yield task
        ids >>= 1
        task += 1


def text_of(ids: int) -> str:
    """The same in words."""
    return ", ".join(f"task {task + 1}" for task in tasks_of(ids)) or "nothing"


def pass_dead_time(s: State) -> Iterator[Step]:
    """The dead time passes with no heartbeat stored or answered: for everyone, since clocks run alike."""
    later = s._replace(
        workers=tuple(w._replace(late=True) if w.alive else w for w in s.workers),
        members=tuple(m._replace(silent=True) for m in s.members),
        calls=tuple(c._replace(late=True) if c.kind == "beat_consumer" else c for c in s.calls),
    )
    if later != s:
        yield "the dead time passes", later


def kill(s: State, w: int) -> State:
    """A worker dies; what it has sent may still be run. Transactions of its handlers are the server's to end."""
    calls = tuple(
        call._replace(lost=True) if call.worker == w else call
        for call in s.calls
        if call.worker != w or call.phase != ANSWERED
    )
    s = s._replace(calls=calls, crashes=s.crashes - 1)
    return set_worker(s, w, Worker(alive=False, name=0))


def tells(s: State, call: Call) -> bool:
    """Whether the answer to a heartbeat says anything new."""
    worker = s.workers[call.worker]
    return worker.name == call.name and (call.dead or bool(call.known) or call.late != worker.late)


def running_of(worker: Worker) -> int:
    """What its heartbeat names."""
    return sum(1 << h.task for h in worker.holds if h.state == RUNNING and h.name == worker.name)


def claim_of(s: State, worker: int, name: int, no: int) -> Claim | None:
    """The claim of this number."""
    for claim in s.claims:
        if (claim.worker, claim.name, claim.no) == (worker, name, no):
            return claim
    return None


def is_locked(s: State, worker: int, name: int, no: int) -> bool:
    """Whether a transaction that has not ended has deleted that claim."""
    return any(tx.written and (tx.worker, tx.name, tx.no) == (worker, name, no) for tx in s.transactions)


def held_by(s: State, call: Call) -> int:
    """What the claim holds that a statement is about."""
    for claim in s.claims:
        if (claim.worker, claim.name, claim.no) == (call.worker, call.name, call.no):
            return claim.ids
    return 0


def first_ready(s: State, most: int) -> int:
    """So many tasks that are ready, at most."""
    ids = 0
    for n, task in enumerate(s.tasks):
        if task.ready and most:
            ids |= 1 << n
            most -= 1
    return ids


def put(worker: Worker, hold: Hold, state: int) -> Worker:
    """With a task in another state."""
    return worker._replace(holds=tuple(h._replace(state=state) if h == hold else h for h in worker.holds))


def names_of(names: tuple[tuple[int, int], ...]) -> str:
    """Registrations in words."""
    return ", ".join(f"worker {worker + 1}" for worker, _ in names) or "nobody"


def replaced(rows: tuple[Claim, ...] | tuple[Member, ...], at: int, row: Claim | Member) -> tuple:  # type: ignore[type-arg]
    """Rows with another one at this place."""
    return (*rows[:at], row, *rows[at + 1 :])


def with_call(s: State, call: Call) -> State:
    """With a statement under way."""
    return s._replace(calls=(*s.calls, call))


def without_call(s: State, at: int) -> State:
    """With this statement no longer under way."""
    return s._replace(calls=s.calls[:at] + s.calls[at + 1 :])


def set_call(s: State, at: int, call: Call) -> State:
    """With another state of this statement."""
    if call.lost and call.phase == ANSWERED:
        return without_call(s, at)
    return s._replace(calls=(*s.calls[:at], call, *s.calls[at + 1 :]))


def set_worker(s: State, w: int, worker: Worker) -> State:
    """With another state of this worker."""
    return s._replace(workers=(*s.workers[:w], worker, *s.workers[w + 1 :]))


def set_leader(s: State, number: int, leader: Leader) -> State:
    """With another state of this leader."""
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
        if task.effects > 1:
            raise Violation(f"the effects of task {n + 1} are there twice")
        if task.effects and not task.ended:
            raise Violation(f"the effects of task {n + 1} are committed, and its completion is not")
        if task.ended > 1:
            raise Violation(f"task {n + 1} ends twice")
        if not (task.ready or task.delayed or task.ended or held >> n & 1):
            raise Violation(f"task {n + 1} is lost: it is in no table")
        if task.attempts > max_attempts:
            raise Violation(f"task {n + 1} is charged for more attempts than it has")


def renumbered(s: State) -> State:
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
        if call.kind in _NUMBERED:
            numbers.update((call.worker, call.name, no) for no in call.known)
    for tx in s.transactions:
        names.add((tx.worker, tx.name))
        numbers.add((tx.worker, tx.name, tx.no))
    for w, worker in enumerate(s.workers):
        if worker.name:
            names.add((w, worker.name))
        for hold in worker.holds:
            names.add((w, hold.name))
            numbers.update((w, hold.name, n) for n in (hold.no, hold.own, hold.fresh))
    name = _ranks(names)
    no = _ranks(numbers)
    return s._replace(
        claims=tuple(sorted(c._replace(name=name[c.worker, c.name], no=no[c.worker, c.name, c.no]) for c in s.claims)),
        members=tuple(sorted(m._replace(name=name[m.worker, m.name], silent=m.silent or m.dead) for m in s.members)),
        workers=tuple(
            worker._replace(
                name=name[w, worker.name] if worker.name else 0,
                holds=tuple(
                    sorted(
                        h._replace(
                            name=name[w, h.name],
                            no=no[w, h.name, h.no],
                            own=no[w, h.name, h.own],
                            fresh=no[w, h.name, h.fresh],
                        )
                        for h in worker.holds
                    )
                ),
            )
            for w, worker in enumerate(s.workers)
        ),
        calls=tuple(
            sorted(
                c._replace(
                    name=name[c.worker, c.name],
                    no=no[c.worker, c.name, c.no],
                    known=tuple(no[c.worker, c.name, n] for n in c.known) if c.kind in _NUMBERED else c.known,
                )
                for c in s.calls
            )
        ),
        leaders=tuple(Leader(tuple(sorted((w, name.get((w, n), 0)) for w, n in x.silent))) for x in s.leaders),
        transactions=tuple(
            sorted(
                tx._replace(name=name[tx.worker, tx.name], no=no[tx.worker, tx.name, tx.no]) for tx in s.transactions
            )
        ),
    )


def _ranks(
    numbers: set[tuple[int, ...]] | set[tuple[int, int]] | set[tuple[int, int, int]],
) -> dict[tuple[int, ...], int]:
    """By all but the last: the how manieth it is, from 0 on: up, or down."""
    ranks: dict[tuple[int, ...], int] = {}
    counts: dict[tuple[int, ...], int] = {}
    for number in sorted(n for n in numbers if n[-1] >= 0):
        if number[-1] == 0:
            ranks[number] = 0
            continue
        counts[number[:-1]] = counts.get(number[:-1], 0) + 1
        ranks[number] = counts[number[:-1]]
    counts.clear()
    for number in sorted((n for n in numbers if n[-1] < 0), reverse=True):
        counts[number[:-1]] = counts.get(number[:-1], 0) - 1
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
        transactions=tuple(sorted(tx._replace(worker=new[tx.worker]) for tx in s.transactions)),
    )
