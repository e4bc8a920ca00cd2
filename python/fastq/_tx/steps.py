"""What is written, step by step, whoever carries it out: once for all drivers, sync and async."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from fastq._engine import TxTasks
from fastq._tx.parts import Answer
from fastq.errors import EnqueueError

#: A token can be freed between the insert that met it and the question who holds it, but hardly this often.
_ROUNDS: Final = 20


@dataclass(slots=True, frozen=True)
class Number:
    """Let the producer's own connection give ids and lanes."""


@dataclass(slots=True, frozen=True)
class Query:
    """Run the statement of that name."""

    name: str
    params: list[str]


@dataclass(slots=True, frozen=True)
class Copy:
    """COPY rows into a leaf."""

    leaf: int
    blocks: list[bytes]


@dataclass(slots=True, frozen=True)
class Command:
    """Run a command without parameters."""

    text: str
    is_open: bool
    """What was written since must be undone when the call is interrupted."""


#: A call of several statements: interrupted between two, it leaves nothing behind.
_BEGIN: Final = Command("SAVEPOINT fastq_enqueue", is_open=True)
_END: Final = Command("RELEASE SAVEPOINT fastq_enqueue", is_open=False)
#: What an interrupted call is undone by, also where a cancelled statement has failed the transaction.
UNDO: Final = ("ROLLBACK TO SAVEPOINT fastq_enqueue", "RELEASE SAVEPOINT fastq_enqueue")

Step = Number | Query | Copy | Command
Steps = Generator[Step, Answer, None]


def write(tasks: TxTasks, *, notify: bool) -> Steps:
    """Write tasks: a few in one statement, many by COPY, inside a savepoint."""
    if tasks.is_small:
        yield from _write_small(tasks)
        if notify:
            yield from _notify(tasks)
        return
    yield _BEGIN
    # Known duplicates get no ids: the gaps would cut chunks.
    yield from _find(tasks)
    yield Number()
    yield from _take(tasks)
    tasks.check()
    blocks, statements = tasks.write_large()
    if blocks:
        yield Copy(tasks.leaf, blocks)
    for params in statements:
        yield Query("enqueue_tx", params)
    for name, params in tasks.swaps():
        yield Query(name, params)
    if notify:
        yield from _notify(tasks)
    yield _END


def after(work: Steps, answer: Answer) -> Step | None:
    """The step after this answer; None: all is written."""
    try:
        return work.send(answer)
    except StopIteration:
        return None


def _write_small(tasks: TxTasks) -> Steps:
    yield Number()
    for attempt in range(_ROUNDS):
        taken = yield Query("enqueue_tx", tasks.write_small(attempt == 0))
        tasks.took(taken[0])
        yield from _find(tasks)
        if tasks.take_over():
            # A token that is taken over stays with its task, also where the call is interrupted in between.
            yield _BEGIN
            yield from _take_over(tasks)
            taken = yield Query("enqueue_tx", tasks.write_small(is_first=False))
            tasks.took(taken[0])
            yield _END
        if not tasks.has_open_tokens:
            return
    raise _restless()


def _take(tasks: TxTasks) -> Steps:
    for _ in range(_ROUNDS):
        for name, params in tasks.take():
            taken = yield Query(name, params)
            tasks.took(taken[0])
        yield from _find(tasks)
        yield from _take_over(tasks)
        if not tasks.has_open_tokens:
            return
    raise _restless()


def _take_over(tasks: TxTasks) -> Steps:
    for number, keys, params in tasks.take_over():
        yield Query("hold_tokens", keys)
        places, ids = yield Query("take_over_tokens", params)
        tasks.took_over(number, places, ids)


def _find(tasks: TxTasks) -> Steps:
    for number, params in tasks.find():
        places, ids, may_go = yield Query("find_tokens_tx", params)
        tasks.found(number, places, ids, may_go)


def _notify(tasks: TxTasks) -> Steps:
    for params in tasks.notification():
        yield Query("notify_tx", params)


def _restless() -> EnqueueError:
    return EnqueueError(
        "idempotency tokens were taken and freed by others faster than they could be read: roll your transaction back and run it again"
    )


__all__ = ["UNDO", "Command", "Copy", "Number", "Query", "Step", "Steps", "after", "write"]
