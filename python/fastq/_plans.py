"""What a client's calls ask of the database, transaction by transaction: written once for `Client` and `AsyncClient`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

from fastq._actions import Action, Change, act_on_batch, act_on_one, not_found
from fastq._arguments import Filter, check_id
from fastq._lists import LOOKS, lanes_of, look
from fastq._records import (
    LAST_ID,
    STATES,
    WAITING,
    ConsumerRecord,
    Kind,
    State,
    TaskRecord,
    check_states,
    to_consumer,
    to_record,
)
from fastq._work import Plan, Statement, Turn, Work, read, take
from fastq.errors import DatabaseError, SettingsError

Counts: TypeAlias = dict[str, int] | dict[str, dict[str, int]]

#: Tasks that one transaction of a call for many changes: their rows stay locked until its commit, a few milliseconds later.
BATCH: Final = 500

_NO_CHANGE: Final = Change()


def get_task(schema: str, id_: int) -> Plan[TaskRecord]:
    """Of `Client.get_task`."""
    check_id(id_)
    rows = (yield from read("find_task", id_, walk=True)) if 0 < id_ <= LAST_ID else []
    if not rows:
        raise not_found(schema, id_)
    return to_record(rows[0], with_errors=True)


def counts(by: Literal["queue", "type"] | None, states: Sequence[State | Kind] | None) -> Plan[Counts]:
    """Of `Client.counts`."""
    wanted: tuple[State | Kind, ...] = STATES if states is None else tuple(check_states(states))
    if by not in (None, "queue", "type"):
        raise SettingsError(f"by is {by!r}, but must be None, 'queue' or 'type'")
    split: dict[str, dict[str, int]] = {}
    for queue, type_, found, tasks in (yield from read("count_tasks", walk=False)):
        name = "" if by is None else queue if by == "queue" else type_
        numbers = split.setdefault(name, dict.fromkeys(wanted, 0))
        for state in ("pending", found) if found in WAITING else (found,):
            if state in numbers:
                numbers[state] += tasks
    return split if by is not None else split.get("", dict.fromkeys(wanted, 0))


def list_consumers() -> Plan[tuple[ConsumerRecord, ...]]:
    """Of `Client.list_consumers`."""
    rows = yield from read("list_consumers", walk=True)
    return tuple(to_consumer(row) for row in rows)


def act(schema: str, action: Action, id_: int, change: Change = _NO_CHANGE) -> Plan[TaskRecord]:
    """Of a call that does something to one task and leaves it there."""
    record = yield from _act(schema, action, id_, change)
    # Only a deletion leaves nothing to answer.
    assert record is not None  # noqa: S101
    return record


def act_tx(schema: str, action: Action, id_: int, change: Change) -> Plan[TaskRecord]:
    """As `act`, in the user's transaction, after `make_lane` in one of its own."""
    _check_known(schema, id_)
    record = yield from act_on_one(schema, action, id_, change)
    assert record is not None  # noqa: S101
    if change.priority not in (None, record.priority):
        raise DatabaseError(
            f"task {id_} keeps priority {record.priority}: your transaction began before priority {change.priority} was known here, "
            "roll it back and run it again",
            sqlstate="40001",
            is_transient=True,
        )
    return record


def make_lane(schema: str, id_: int, change: Change) -> Plan[None]:
    """As `make_lanes`, for one task."""
    _check_known(schema, id_)
    yield from make_lanes([id_], change)


def make_lanes(ids: Sequence[int], change: Change) -> Plan[None]:
    """Lanes for these tasks with another priority, committed before they are needed: no producer waits for one of them."""
    if change.priority is None:
        return
    if lanes := sorted({lane for _, lane, _ in (yield from read("locate_tasks", list(ids), walk=True))}):

        def work() -> Work[None]:
            yield Statement("create_lanes", lanes, change.priority)

        yield from take(Turn(work, repeatable=True))


def delete(schema: str, id_: int) -> Plan[None]:
    """Of `Client.delete_task`."""
    yield from _act(schema, "delete", id_, _NO_CHANGE)


def _act(schema: str, action: Action, id_: int, change: Change) -> Plan[TaskRecord | None]:
    _check_known(schema, id_)
    yield from make_lanes([id_], change)
    return (yield from act_on_one(schema, action, id_, change))


def _check_known(schema: str, id_: int) -> None:
    check_id(id_)
    if not 0 < id_ < LAST_ID:
        raise not_found(schema, id_)


def count_tasks(wanted: Filter) -> Plan[int]:
    """Of `Client.count_tasks`."""
    if wanted.ids is not None or wanted.within is not None or wanted.priorities is not None:
        return (yield from _over_batches(wanted, None))
    return sum(
        tasks
        for queue, type_, place, tasks in (yield from read("count_tasks", walk=False))
        if place in wanted.places
        and (wanted.types is None or type_ in wanted.types)
        and (wanted.queues is None or queue in wanted.queues)
    )


def act_on_many(action: Action, wanted: Filter, change: Change = _NO_CHANGE) -> Plan[int]:
    """Of a call for many tasks."""

    def act_on(batch: list[int]) -> Plan[int]:
        yield from make_lanes(batch, change)
        return (yield from act_on_batch(action, batch, wanted.places, change))

    return _over_batches(wanted, act_on)


def _over_batches(wanted: Filter, act_on: Callable[[list[int]], Plan[int]] | None) -> Plan[int]:
    """The tasks that match, in order of ids and in batches, each looked for when it is its turn: how many were acted on, or match."""
    lanes = yield from lanes_of(wanted.types, wanted.queues, wanted.priorities)
    places = wanted.places
    count = 0
    if not places or lanes == []:
        return count
    if wanted.ids is not None:
        for i in range(0, len(wanted.ids), BATCH):
            found = yield from read("locate_tasks", wanted.ids[i : i + BATCH], walk=True)
            batch = [id_ for id_, lane, place in found if place in places and (lanes is None or lane in lanes)]
            if batch:
                count += len(batch) if act_on is None else (yield from act_on(batch))
        return count
    if wanted.within is not None:
        at: int | None = wanted.within.first_id - 1
        while at is not None and at < wanted.within.last_id:
            tasks, edge = yield from look((places, lanes, wanted.within), BATCH, at, LOOKS[1], descending=False)
            batch = [task[0] for task in tasks]
            if batch:
                count += len(batch) if act_on is None else (yield from act_on(batch))
            # A full batch: there may be more right behind it.
            at = batch[-1] if len(batch) == BATCH else edge
        return count
    last = 0
    while rows := (yield from read("pick_tasks", BATCH, last, lanes, *places.params, walk=True)):
        batch = [id_ for (id_,) in rows]
        count += len(batch) if act_on is None else (yield from act_on(batch))
        last = batch[-1]
    return count


__all__ = [
    "BATCH",
    "Counts",
    "act",
    "act_on_many",
    "act_tx",
    "count_tasks",
    "counts",
    "delete",
    "get_task",
    "make_lane",
]
