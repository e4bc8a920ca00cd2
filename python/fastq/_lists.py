"""Pages of tasks: what they ask of the database, and what they answer within bounds."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from fastq._arguments import Within, read_priorities, read_texts, read_within
from fastq._records import LAST_ID, Kind, Page, Places, State, TaskRecord, places_of, to_record
from fastq._work import Plan, Row, read
from fastq.errors import SettingsError

Order: TypeAlias = Literal["created_at", "id"]
#: States, types, queues and priorities.
What: TypeAlias = tuple[Sequence[State | Kind] | None, Sequence[str] | None, Sequence[str] | None, Sequence[int] | None]
#: Ids from and to, created since and before, and what a payload contains.
Which: TypeAlias = tuple[int | None, int | None, datetime | None, datetime | None, str | bytes | None]

#: A page holds at most this many tasks: their payloads are in memory together.
LIMIT: Final = 10_000
#: Rows of each state's table that one statement looks at; more than 1,023, which the completed ones need to get on.
ROWS: Final = 20_000
#: Tasks whose times and payloads one statement looks at, where these decide: at least, and at most.
LOOKS: Final = (1_000, 8_000)
#: For a text, the first one looks at so many for each task that is wanted, each then at twice as many: a page of what a hundredth of all
#: tasks match comes with one statement, whose preparation costs as much as some thousand looks. What matches a time lies together instead.
_LOOKS_A_TASK: Final = 120
#: Seconds after which a page is answered as it is. A statement that began before takes some hundredths more.
LONG_ENOUGH: Final = 0.15

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_AFTER: Final = re.compile(r"(?P<order>id|created_at)-(?P<way>up|down)-(?P<time>-?\d{1,17})-(?P<id>\d{1,18})", re.ASCII)


def list_tasks(
    what: What, which: Which, *, limit: int, order_by: Order, descending: bool, after: str | None
) -> Plan[Page]:
    """Of `Client.list_tasks`."""
    states, types, queues, priorities = what
    places = places_of(states)
    if limit.__class__ is not int or not 1 <= limit <= LIMIT:
        raise SettingsError(f"limit is {limit!r}, but must be a whole number from 1 to {LIMIT:,}")
    if order_by not in ("created_at", "id"):
        raise SettingsError(f"order_by is {order_by!r}, but must be 'created_at' or 'id'")
    if not isinstance(descending, bool):
        raise SettingsError(f"descending is {descending!r:.100}, but must be True or False")
    within = read_within(*which)
    time_, last_id = _from_after(after, order_by, descending=descending)
    if order_by == "created_at" and within.text is not None:
        raise SettingsError(
            "payload_contains is looked for in order of ids: it can't be given with order_by='created_at'"
        )
    lanes = yield from lanes_of(types, queues, priorities)
    if lanes == [] or not places:
        return Page((), None)
    if order_by == "id":
        return (yield from _by_id(places, lanes, within, limit, last_id, descending=descending))
    # One more than wanted tells whether there are more.
    bounds = (within.first_id, within.last_id, within.since, within.before)
    parts = (limit + 1, last_id, lanes, *places.params, time_, descending, *bounds)
    rows = yield from read("list_tasks_by_created_at", *parts, walk=False)
    tasks = tuple(to_record(row, with_errors=False) for row in rows[:limit])
    return Page(tasks, _to_after(tasks[-1], descending=descending) if len(rows) > limit else None)


def _by_id(
    places: Places, lanes: list[int] | None, within: Within, limit: int, at: int, *, descending: bool
) -> Plan[Page]:
    """Statement after statement, each of which looks at so much, until the page is full, all is seen, or it was long enough."""
    until = time.monotonic() + LONG_ENOUGH
    way, far = ("down", within.first_id) if descending else ("up", within.last_id)
    at = min(max(at, 0), within.last_id + 1) if descending else max(at, within.first_id - 1)
    tasks: list[TaskRecord] = []
    looks = LOOKS[0] if within.text is None else max(LOOKS[0], _LOOKS_A_TASK * (limit + 1))
    while at > far if descending else at < far:
        left = limit - len(tasks)
        # One more than wanted tells whether there are more.
        rows, edge = yield from look((places, lanes, within), left + 1, at, looks, descending=descending)
        tasks += [to_record(row, with_errors=False) for row in rows[:left]]
        if len(rows) > left:
            edge = tasks[-1].id
        if edge is None:
            break
        at, looks = edge, 2 * looks
        if len(tasks) >= limit or time.monotonic() >= until:
            return Page(tuple(tasks), f"id-{way}-0-{at}")
    return Page(tuple(tasks), None)


def look(
    where: tuple[Places, list[int] | None, Within], most: int, at: int, looks: int, *, descending: bool
) -> Plan[tuple[list[Row], int | None]]:
    """One statement's look for tasks of these states, lanes and contents beyond an id, in order of ids.

    Returns:
        At most so many, and up to which id it has looked; None: at all.
    """
    places, lanes, within = where
    way, far = ("descending", within.first_id) if descending else ("ascending", within.last_id)
    seen = max(min(looks, LOOKS[1]) if within.looks else 0, most)
    bounds = (far, within.since, within.before, within.text, ROWS, seen)
    rows = yield from read(f"list_tasks_by_id_{way}", most, at, lanes, *places.params, *bounds, walk=True)
    edge: int | None = rows[0][-1]
    return [row[:-1] for row in rows if row[0] is not None], edge


def lanes_of(
    types: Sequence[str] | None, queues: Sequence[str] | None, priorities: Sequence[int] | None = None
) -> Plan[list[int] | None]:
    """The lanes of these types, queues and priorities; None: all."""
    if types is None and queues is None and priorities is None:
        return None
    wanted = (read_texts("types", types), read_texts("queues", queues), read_priorities(priorities))
    rows = yield from read("find_lanes", *wanted, walk=False)
    return [lane for (lane,) in rows]


def _to_after(last: TaskRecord, *, descending: bool) -> str:
    time_ = (last.created_at - _EPOCH) // timedelta(microseconds=1)
    return f"created_at-{'down' if descending else 'up'}-{time_}-{last.id}"


def _from_after(after: object, order_by: Order, *, descending: bool) -> tuple[datetime | None, int]:
    if after is None:
        return None, LAST_ID if descending else 0
    found = _AFTER.fullmatch(after) if isinstance(after, str) else None
    if found is None or found["order"] != order_by or found["way"] != ("down" if descending else "up"):
        raise SettingsError(f"after is {after!r}, but must be `next` of a page that was listed in the same order")
    return _EPOCH + timedelta(microseconds=int(found["time"])), int(found["id"])


__all__ = ["LIMIT", "Order", "lanes_of", "list_tasks"]
