"""What is asked of the database, said statement by statement and sent by whoever asks: written once for sync and async callers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from fastq.errors import DatabaseError

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True, init=False)
class Statement:
    """The statement of that name, with its parameters. Its rows are sent back, or what it raised is thrown in."""

    name: str
    params: tuple[object, ...]

    def __init__(self, name: str, *params: object) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "params", params)


#: Statements on one connection, and what comes of them.
Work: TypeAlias = Generator[Statement, list[Row], T]


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """One transaction."""

    work: Callable[[], Work[T]]
    walk: bool = True
    """It finds all it needs by indexes, whatever the statistics say."""
    changes: bool = True
    """It takes a worker's rights."""
    repeatable: bool = False
    """It may be done again although it may have been committed."""


#: Transactions one after the other, and what comes of them.
Plan: TypeAlias = Generator[Turn[Any], Any, T]


def take(turn: Turn[T]) -> Plan[T]:
    """One transaction, typed."""
    answer: T = yield turn
    return answer


def read(name: str, *params: object, walk: bool) -> Plan[list[Row]]:
    """One statement that changes nothing. Twice does no harm: a connection that was idle for hours shows its loss at its next use."""

    def work() -> Work[list[Row]]:
        return (yield Statement(name, *params))

    return take(Turn(work, walk=walk, changes=False, repeatable=True))


def perform(work: Work[T], query: Callable[..., list[Row]]) -> T:
    """Go through the statements of ``work``. Raises what ``query`` and the work raise."""
    try:
        statement = next(work)
        while True:
            try:
                rows = query(statement.name, *statement.params)
            except DatabaseError as error:
                statement = work.throw(error)
            else:
                statement = work.send(rows)
    except StopIteration as end:
        answer: T = end.value
        return answer


async def aperform(work: Work[T], query: Callable[..., Awaitable[list[Row]]]) -> T:
    """As `perform`."""
    try:
        statement = next(work)
        while True:
            try:
                rows = await query(statement.name, *statement.params)
            except DatabaseError as error:
                statement = work.throw(error)
            else:
                statement = work.send(rows)
    except StopIteration as end:
        answer: T = end.value
        return answer


def conduct(plan: Plan[T], carry_out: Callable[[Turn[Any]], Any]) -> T:
    """Go through the transactions of ``plan``. Raises what ``carry_out`` and the plan raise."""
    try:
        turn = next(plan)
        while True:
            turn = plan.send(carry_out(turn))
    except StopIteration as end:
        answer: T = end.value
        return answer


async def aconduct(plan: Plan[T], carry_out: Callable[[Turn[Any]], Awaitable[Any]]) -> T:
    """As `conduct`."""
    try:
        turn = next(plan)
        while True:
            turn = plan.send(await carry_out(turn))
    except StopIteration as end:
        answer: T = end.value
        return answer


__all__ = ["Plan", "Row", "Statement", "Turn", "Work", "aconduct", "aperform", "conduct", "perform", "read", "take"]
