"""Pages of tasks: what they ask of the database, and what they answer within bounds."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeAlias

from fastq._arguments import read_priorities, read_texts
from fastq._records import LAST_ID, Kind, Page, Places, State, TaskRecord, places_of, to_record
from fastq._work import Plan, Row, read
from fastq.errors import SettingsError
from fastq.task import check_aware

Order: TypeAlias = Literal["created_at", "id"]
#: States, types, queues and priorities.
What: TypeAlias = tuple[Sequence[State | Kind] | None, Sequence[str] | None, Sequence[str] | None, Sequence[int] | None]
#: Ids from and to, created since and before, and what a payload contains.
Which: TypeAlias = tuple[int | None, int | None, datetime | None, datetime | None, str | bytes | None]

#: A page holds at most this many tasks: their payloads are in memory together.
LIMIT: Final = 10_000
#: Rows of each state's table that one statement looks at; more than 1,023, which the completed ones need to get on.
ROWS: Final = 20_000
#: Tasks whose times and payloads one statement looks at, where these decide: the first one, each then twice as many, and at most.
LOOKS: Final = (1_000, 8_000)
#: Seconds after which a page is answered as it is. A statement that began before takes some hundredths more.
LONG_ENOUGH: Final = 0.15

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_AFTER: Final = re.compile(r"(?P<order>id|created_at)-(?P<way>up|down)-(?P<time>-?\d{1,17})-(?P<id>\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Within:
    """Which tasks are meant, whatever they are."""

    first_id: int
    last_id: int
    since: datetime | None
    before: datetime | None
    text: bytes | None

    @property
    def looks(self) -> bool:
        """Whether a task's content decides."""
        return self.since is not None or self.before is not None or self.text is not None


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
    within = _read_within(*which)
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
    places: Places, lanes: list[int] | None, within: _Within, limit: int, at: int, *, descending: bool
) -> Plan[Page]:
    """Statement after statement, each of which looks at so much, until the page is full, all is seen, or it was long enough."""
    until = time.monotonic() + LONG_ENOUGH
    way, name, far = "up", "list_tasks_by_id_ascending", within.last_id
    at = max(at, within.first_id - 1)
    if descending:
        way, name, far = "down", "list_tasks_by_id_descending", within.first_id
        at = min(max(at, 0), within.last_id + 1)
    tasks: list[TaskRecord] = []
    looks, most = LOOKS
    while at > far if descending else at < far:
        left = limit - len(tasks)
        # One more than wanted tells whether there are more.
        bounds = (far, within.since, within.before, within.text, ROWS, max(looks if within.looks else 0, left + 1))
        rows: list[Row] = yield from read(name, left + 1, at, lanes, *places.params, *bounds, walk=True)
        found = [row[:-1] for row in rows if row[0] is not None]
        tasks += [to_record(row, with_errors=False) for row in found[:left]]
        edge: int | None = rows[0][-1]
        if len(found) > left:
            edge = tasks[-1].id
        if edge is None:
            break
        at, looks = edge, min(2 * looks, most)
        if len(tasks) >= limit or time.monotonic() >= until:
            return Page(tuple(tasks), f"id-{way}-0-{at}")
    return Page(tuple(tasks), None)


def lanes_of(
    types: Sequence[str] | None, queues: Sequence[str] | None, priorities: Sequence[int] | None = None
) -> Plan[list[int] | None]:
    """The lanes of these types, queues and priorities; None: all."""
    if types is None and queues is None and priorities is None:
        return None
    wanted = (read_texts("types", types), read_texts("queues", queues), read_priorities(priorities))
    rows = yield from read("find_lanes", *wanted, walk=False)
    return [lane for (lane,) in rows]


def _read_within(first_id: Any, last_id: Any, since: Any, before: Any, text: Any) -> _Within:
    for name, id_ in (("first_id", first_id), ("last_id", last_id)):
        if id_ is not None and id_.__class__ is not int:
            raise SettingsError(f"{name} is {id_!r}, but must be a whole number")
    for name, at in (("created_since", since), ("created_before", before)):
        if at is not None:
            check_aware(name, at)
    if text is not None and (not isinstance(text, str | bytes) or not text):
        raise SettingsError(f"payload_contains is {text!r}, but must be a text or bytes, and not empty")
    try:
        wanted = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise SettingsError(f"payload_contains is {text!r}, which is no text: {error}") from None
    return _Within(
        max(0, 0 if first_id is None else min(first_id, LAST_ID)),
        LAST_ID - 1 if last_id is None else min(max(last_id, 0), LAST_ID - 1),
        since,
        before,
        wanted,
    )


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
