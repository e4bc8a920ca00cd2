"""Proof that the work was done: every task once, in the tables and in the handlers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from fastq._db import Database
from fastq.bench._errors import BenchError
from fastq.bench._handlers import Starts
from fastq.task import Enqueued

#: Ids from (included) to (excluded).
Ranges: TypeAlias = list[tuple[int, int]]

#: Differences that an error names.
_SHOWN: Final = 5


def check_enqueued(db: Database, results: Iterable[Sequence[Enqueued]], *, tokens: bool = False) -> None:
    """That the tasks which were answered, and no others, wait to be claimed. Raises BenchError."""
    expected = enqueued_ranges(results)
    tasks = _size(expected)
    _check_tables(db, tasks, {"tasks": tasks, "ready": tasks, "tokens": tasks if tokens else 0})
    _check_same("waiting", _read_ranges(db, "bench_waiting_ids"), expected)


def check_completed(db: Database, results: Iterable[Sequence[Enqueued]], starts: Starts) -> None:
    """That the tasks which were answered, and no others, completed exactly once and started exactly once. Raises BenchError."""
    expected = enqueued_ranges(results)
    tasks = _size(expected)
    _check_tables(db, tasks, {"tasks": tasks})
    _check_completions(db, expected, starts)


def check_drained(
    db: Database, results: Iterable[Sequence[Enqueued]], starts: Starts, *, waiting: Iterable[Sequence[Enqueued]]
) -> None:
    """As `check_completed`, beside others that wait and that nobody has touched. Raises BenchError."""
    expected, others = enqueued_ranges(results), enqueued_ranges(waiting)
    _check_tables(
        db, _size(expected) + _size(others), {"tasks": _size(expected) + _size(others), "ready": _size(others)}
    )
    _check_same("waiting", _read_ranges(db, "bench_waiting_ids"), others)
    _check_completions(db, expected, starts)


def check_started(results: Iterable[Sequence[Enqueued]], starts: Starts) -> None:
    """That handlers were started for the tasks which were answered, and no others, exactly once each. Raises BenchError."""
    _check_starts(starts, enqueued_ranges(results))


def enqueued_ranges(results: Iterable[Sequence[Enqueued]]) -> Ranges:
    """The ids in ``results``, each of which must be new. Raises BenchError."""
    runs: Ranges = []
    first = after = 0
    for id_, is_new in itertools.chain.from_iterable(results):
        if not is_new:
            raise BenchError(f"task {id_} was answered as a duplicate, but no two have the same token")
        if id_ != after:
            if after:
                runs.append((first, after))
            first = id_
        after = id_ + 1
    if after:
        runs.append((first, after))
    return _join(runs)


def _join(runs: Ranges) -> Ranges:
    """The same, in order and with gaps between them. Raises BenchError for an id that is in two."""
    joined: Ranges = []
    for low, high in sorted(runs):
        if joined and low < joined[-1][1]:
            raise BenchError(f"task {low} was answered twice")
        if joined and low == joined[-1][1]:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _read_ranges(db: Database, query: str) -> Ranges:
    return [(low, high) for low, high in db.query(query)]


def _size(ranges: Ranges) -> int:
    return sum(high - low for low, high in ranges)


def _check_completions(db: Database, expected: Ranges, starts: Starts) -> None:
    tasks = _size(expected)
    [(completions,)] = db.query("bench_completed")
    _check_same("completed", _read_ranges(db, "bench_completed_ids"), expected)
    if completions != tasks:
        raise BenchError(
            f"{tasks:,} tasks completed, but {completions:,} completions are stored: some completed more than once"
        )
    _check_starts(starts, expected)


def _check_tables(db: Database, tasks: int, expected: dict[str, int]) -> None:
    names = ("tasks", "ready", "claimed", "delayed", "dead", "errors", "tokens")
    [counts] = db.query("bench_tasks")
    wrong = [
        f"{found:,} {name} instead of {expected.get(name, 0):,}"
        for name, found in zip(names, counts, strict=True)
        if found != expected.get(name, 0)
    ]
    if wrong:
        raise BenchError(f"of {tasks:,} tasks enqueued, the tables hold {', '.join(wrong)}")


def _check_same(what: str, found: Ranges, expected: Ranges) -> None:
    if found == expected:
        return
    missing = _minus(expected, found)
    strange = _minus(found, expected)
    raise BenchError(
        f"{_size(missing):,} of {_size(expected):,} enqueued tasks are not {what} ({_name(missing)}), "
        f"and {_size(strange):,} are that were not enqueued ({_name(strange)})"
    )


def _minus(left: Ranges, right: Ranges) -> Ranges:
    rest: Ranges = []
    others = iter([*right, (2**63, 2**63)])
    low_right, high_right = next(others)
    for low, high in left:
        at = low
        while at < high:
            while high_right <= at:
                low_right, high_right = next(others)
            if low_right > at:
                rest.append((at, min(high, low_right)))
            at = min(high, high_right) if low_right <= high else high
    return rest


def _name(ranges: Ranges) -> str:
    if not ranges:
        return "none"
    shown = [str(low) if high == low + 1 else f"{low} to {high - 1}" for low, high in ranges[:_SHOWN]]
    return ", ".join(shown) + (" ..." if len(ranges) > _SHOWN else "")


def _check_starts(starts: Starts, expected: Ranges) -> None:
    tasks, ids = _size(expected), starts.ids
    if len(ids) != tasks:
        raise BenchError(f"{tasks:,} tasks completed, but handlers started {len(ids):,} times")
    if not tasks:
        return
    low, high = expected[0][0], expected[-1][1]
    started = bytearray(high - low)
    for id_ in ids:
        if not low <= id_ < high or started[id_ - low]:
            raise BenchError(f"a handler started for task {id_} twice, or it was never enqueued")
        started[id_ - low] = 1
    # As many as there are tasks, none twice: if one was never enqueued, another was never started.
    for first, after in expected:
        if 0 in started[first - low : after - low]:
            missing = started.index(0, first - low, after - low) + low
            raise BenchError(f"task {missing} completed, but its handler never started")


__all__ = ["Ranges", "check_completed", "check_drained", "check_enqueued", "check_started", "enqueued_ranges"]
