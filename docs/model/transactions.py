"""The steps by which a handler completes its task in a transaction of its own: those of its worker, and those of the transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from states import (
    ALONE,
    BEGUN,
    COMPLETED,
    FAILED,
    PARTING,
    RAISED,
    RETURNED,
    RUNNING,
    SHARED,
    UNDONE,
    Call,
    Claim,
    Hold,
    State,
    Step,
    Task,
    Transaction,
    Violation,
    Worker,
    claim_of,
    is_locked,
    set_worker,
    with_call,
)


class Transactions:
    """The steps of one scene.

    Args:
        has: whether a guard is in place.
        max_attempts: of the tasks.
    """

    #: Statements of the worker's that answer at once, or whose answers are lost.
    KINDS: Final = ("part_claims", "settle_tx")

    def __init__(self, has: Callable[[str], bool], max_attempts: int) -> None:
        self._has = has
        self._max_attempts = max_attempts

    def steps(self, s: State) -> Iterator[Step]:
        """All that can happen next.

        Raises:
            Violation: one of these steps must never happen.
        """
        for w, worker in enumerate(s.workers):
            for hold in worker.holds:
                if hold.state == RUNNING:
                    yield from self._handler(s, w, worker, hold)
                if hold.part == PARTING:
                    yield from self._part(s, w, worker, hold)
                elif hold.part == BEGUN and (s.begins or hold.state != RUNNING):
                    yield from self._settle(s, w, worker, hold)
        for at in range(len(s.transactions)):
            yield from self._database(s, at)

    def run(self, s: State, call: Call) -> State:
        """The statement of one of `KINDS`, whole."""
        [number] = call.known
        claims = list(s.claims)
        if call.kind == "settle_tx":
            # Nobody waits for a transaction that is open.
            if self._has("fresh") and not is_locked(s, call.worker, call.name, call.no):
                claims = [c._replace(no=number) if _key(c) == (call.worker, call.name, call.no) else c for c in claims]
            return s._replace(claims=tuple(claims))
        for n, claim in enumerate(claims):
            if _key(claim) == (call.worker, call.name, call.no) and claim.ids & call.ids:
                named = next((m.running for m in s.members if (m.worker, m.name) == _key(claim)[:2]), 0)
                own = Claim(call.worker, call.name, number, call.ids, claim.started & call.ids, named & call.ids)
                rest = claim.ids & ~call.ids
                left = (
                    [claim._replace(ids=rest, started=claim.started & rest, named=claim.named & rest)] if rest else []
                )
                return s._replace(claims=(*claims[:n], *left, *claims[n + 1 :], own))
        return s

    # --- the worker ----------------------------------------------------------------------------------

    def _handler(self, s: State, w: int, worker: Worker, hold: Hold) -> Iterator[Step]:
        who, what = f"worker {w + 1}", f"task {hold.task + 1}"
        if s.begins and hold.part == SHARED:
            yield from self._part(s, w, worker, hold)
        if s.begins and hold.part in (ALONE, UNDONE):
            tx = Transaction(w, hold.name, hold.own, hold.task)
            begun = s._replace(begins=s.begins - 1, transactions=(*s.transactions, tx))
            yield (
                f"{who}'s handler sends complete_tx for {what}",
                _put(begun, w, worker, hold, hold._replace(part=BEGUN)),
            )
        if hold.part != SHARED:
            yield f"{who}'s handler returns from {what}", _put(s, w, worker, hold, self._ended(hold, RETURNED))
            if self._max_attempts > 1:
                yield f"{who}'s handler raises in {what}", _put(s, w, worker, hold, self._ended(hold, RAISED))

    def _ended(self, hold: Hold, state: int) -> Hold:
        """The handler has ended: its outcome counts, or is put aside."""
        if hold.part == ALONE:
            return _outcome(hold, state)
        if hold.part == UNDONE:
            return self._undone(hold, state)
        return hold._replace(state=state)

    def _undone(self, hold: Hold, state: int) -> Hold:
        """Its transaction was rolled back: what it raised counts, and that it returned is a failure."""
        if state == RAISED or self._has("verdict"):
            return _outcome(hold, RAISED)
        return _outcome(hold, state)._replace(part=UNDONE)

    def _part(self, s: State, w: int, worker: Worker, hold: Hold) -> Iterator[Step]:
        """A claim of its own is asked for, again where no answer came. On its way it is no state of its own, as a result is none."""
        asked = hold._replace(part=PARTING, own=hold.own or self._next_no(s, w, hold.name))
        label = f"worker {w + 1} asks for a claim of its own for task {hold.task + 1} (part_claims)"
        call = Call("part_claims", w, hold.name, hold.no, 1 << hold.task, lost=True, known=(asked.own,))
        after = self.run(s, call)
        if claim_of(after, w, hold.name, asked.own) is not None:
            there = asked._replace(part=ALONE)
            found = there if hold.state == RUNNING else _outcome(there, hold.state)
            yield f"{label}: it is there", _put(after, w, worker, hold, found)
        else:
            gone = hold._replace(part=SHARED, own=0)
            found = gone if hold.state == RUNNING else gone._replace(state=_OUTCOME[hold.state])
            yield f"{label}: the task is no longer its", _put(after, w, worker, hold, found)
        yield from self._lose(s, after, call, (w, worker, hold, asked), label)

    def _settle(self, s: State, w: int, worker: Worker, hold: Hold) -> Iterator[Step]:
        """What became of the transaction is asked, until it has ended."""
        if is_locked(s, w, hold.name, hold.own):
            return
        asked = hold._replace(fresh=hold.fresh or self._next_no(s, w, hold.name))
        label = f"worker {w + 1} asks what became of the transaction for task {hold.task + 1} (settle_tx)"
        call = Call("settle_tx", w, hold.name, hold.own, 1 << hold.task, lost=True, known=(asked.fresh,))
        after = self.run(s, call)
        no = next((n for n in (asked.fresh, hold.own) if claim_of(after, w, hold.name, n) is not None), 0)
        if no:
            judged = tuple(
                tx._replace(judged=True) if (tx.worker, tx.name, tx.no) == (w, hold.name, hold.own) else tx
                for tx in after.transactions
            )
            back = hold._replace(part=UNDONE, own=no, fresh=0)
            found = back if hold.state == RUNNING else self._undone(back, hold.state)
            yield f"{label}: rolled back", _put(after._replace(transactions=judged), w, worker, hold, found)
        else:
            # Committed, or others have the task. To who is still at work the next answer says the same.
            gone = hold._replace(part=SHARED, own=0, fresh=0) if hold.state == RUNNING else None
            yield f"{label}: its claim is gone", _put(after, w, worker, hold, gone)
        yield from self._lose(s, after, call, (w, worker, hold, asked), label)

    def _lose(
        self, s: State, after: State, call: Call, change: tuple[int, Worker, Hold, Hold], label: str
    ) -> Iterator[Step]:
        """The same with the connection lost: before it was run, or after."""
        if s.losses:
            left = s.losses - 1
            yield (
                f"{label} and loses the connection; the server may still run it",
                with_call(_put(s._replace(losses=left), *change), call),
            )
            yield f"{label}; its answer is lost", _put(after._replace(losses=left), *change)

    def _next_no(self, s: State, w: int, name: int) -> int:
        """Below all that were used, and 0."""
        used = [n for h in s.workers[w].holds if h.name == name for n in (h.no, h.own, h.fresh)]
        if self._has("own-numbers"):
            used += [c.no for c in s.claims if (c.worker, c.name) == (w, name)]
            used += [tx.no for tx in s.transactions if (tx.worker, tx.name) == (w, name)]
            for call in s.calls:
                if (call.worker, call.name) == (w, name):
                    used += (call.no, *(call.known if call.kind in self.KINDS else ()))
        return min([0, *used]) - 1

    # --- the transaction -----------------------------------------------------------------------------

    def _database(self, s: State, at: int) -> Iterator[Step]:
        """It may be committed, or rolled back with its connection, at any time, also when its worker is dead."""
        tx = s.transactions[at]
        rest = s.transactions[:at] + s.transactions[at + 1 :]
        label = f"worker {tx.worker + 1}'s handler's transaction"
        yield f"{label} is rolled back", s._replace(transactions=rest)
        claim = claim_of(s, tx.worker, tx.name, tx.no)
        if not self._has("together"):
            yield f"{label} commits, and its worker is to complete the task", _effect(s._replace(transactions=rest), tx)
        elif tx.written:
            if tx.judged:
                raise Violation(f"a transaction commits that task {tx.task + 1}'s worker was told is rolled back")
            s = _effect(s._replace(transactions=rest), tx)
            tasks = list(s.tasks)
            found = tasks[tx.task]
            tasks[tx.task] = found._replace(ended=found.ended + 1, attempts=found.attempts + 1)
            claims = tuple(c for c in s.claims if c != claim)
            yield f"{label} commits: task {tx.task + 1} is completed", s._replace(tasks=tuple(tasks), claims=claims)
        elif claim is None:
            if not self._has("told"):
                raise Violation(f"the effects of task {tx.task + 1} are committed by a run that has lost it")
            yield f"{label}: complete_tx finds no claim, and it rolls back", s._replace(transactions=rest)
        elif not is_locked(s, tx.worker, tx.name, tx.no):
            written = (*rest, tx._replace(written=True))
            yield f"{label}: complete_tx finds the claim", s._replace(transactions=written)


_OUTCOME: Final = {RETURNED: COMPLETED, RAISED: FAILED}


def _key(claim: Claim) -> tuple[int, int, int]:
    return claim.worker, claim.name, claim.no


def _outcome(hold: Hold, state: int) -> Hold:
    """Ended so, and by the number of its own claim."""
    return Hold(hold.name, hold.own, hold.task, _OUTCOME[state])


def _put(s: State, w: int, worker: Worker, hold: Hold, found: Hold | None) -> State:
    holds = tuple(found if h == hold else h for h in worker.holds)
    return set_worker(s, w, worker._replace(holds=tuple(h for h in holds if h is not None)))


def _effect(s: State, tx: Transaction) -> State:
    """What the handler wrote is there."""
    tasks: list[Task] = list(s.tasks)
    tasks[tx.task] = tasks[tx.task]._replace(effects=tasks[tx.task].effects + 1)
    return s._replace(tasks=tuple(tasks))
