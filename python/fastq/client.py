"""Look at tasks: one by its id, many by what they are, and how many there are."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Self, TypeAlias, Unpack, overload

from fastq import migrations
from fastq._db import Database, Row, was_too_late
from fastq._options import ClientOptions, read_client_options
from fastq.errors import ConnectionLost, SettingsError, TaskNotFound
from fastq.settings import resolve_dsn, resolve_schema

State: TypeAlias = Literal["pending", "running", "completed", "failed", "cancelled", "expired"]
Kind: TypeAlias = Literal["scheduled", "retrying"]
Order: TypeAlias = Literal["created_at", "id"]

STATES: Final[tuple[State, ...]] = ("pending", "running", "completed", "failed", "cancelled", "expired")
KINDS: Final[tuple[Kind, ...]] = ("scheduled", "retrying")

#: A page holds at most this many tasks: their payloads are in memory together.
LIMIT: Final = 10_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_ID: Final = 2**63 - 1
_AFTER: Final = re.compile(r"(?P<order>id|created_at)-(?P<way>up|down)-(?P<time>-?\d{1,17})-(?P<id>\d{1,18})", re.ASCII)
# Which parts of the storage a word reads: kinds of what waits, what runs, what completed, what ended badly.
_WAITING: Final = ("ready", *KINDS)
_ENDED_BADLY: Final = ("failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One run of a task that failed, or was lost with its worker."""

    attempt: int
    """Which run it was, from 1."""
    failed_at: datetime
    """When, by the database's clock (aware, UTC)."""
    took: float | None
    """Seconds that the handler ran; None: lost with its worker."""
    error: str
    """What was raised."""
    traceback: str
    """From where; empty where there is none."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as it was when it was looked at. Times are aware, UTC, by the database's clock."""

    id: int
    type: str
    queue: str
    priority: int
    payload: Any
    """What was enqueued: decoded from JSON, or raw ``bytes``."""
    state: State
    kind: Kind | None
    """What a pending task waits for, where it waits for a time: its own (scheduled) or its backoff (retrying)."""
    attempts: int
    """Runs so far, one that is under way too."""
    max_attempts: int
    """Runs in all before it fails for good."""
    created_at: datetime
    """When it was enqueued."""
    run_at: datetime | None
    """When a scheduled or retrying task is due."""
    ended_at: datetime | None
    """When it was completed, failed, cancelled or expired."""
    errors: tuple[FailedAttempt, ...] | None = None
    """Its failed attempts, the first one first; None in a list: ``get_task`` brings them."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list of tasks. Iterating gives the tasks."""

    tasks: tuple[TaskRecord, ...]
    next: str | None
    """For ``after`` of the call that goes on; None: there are no more."""

    def __iter__(self) -> Iterator[TaskRecord]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class Client:
    """Looks at the tasks of one fastq schema, over one connection that is made at the first call and again when it was lost.

    For any number of threads: they take turns. Usable as a context manager.

    Args:
        dsn: the database, as libpq reads it; None: FASTQ_DSN.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.
        **options: ``connect_timeout`` (seconds or timedelta, 10 s), and ``statement_timeout`` (30 s): a statement whose answer takes
            longer counts as a lost connection.

    Raises:
        SettingsError: no dsn, or an unknown or wrong option.

    Every call may raise:
        SettingsError: the dsn or the schema's name can't be used, or an argument is wrong.
        SchemaError: the schema is not migrated, too old, or newer and shut to this fastq.
        ConnectionLost: the connection broke, and the one made in its place too; or no answer came within ``statement_timeout``.
        DatabaseError: no connection, the server refused, or the role lacks rights that a viewer has (``sqlstate`` 42501).
    """

    __slots__ = ("_db", "_dsn", "_lock", "_options", "_pid", "_schema")

    def __init__(self, dsn: str | None = None, *, schema: str | None = None, **options: Unpack[ClientOptions]) -> None:
        self._dsn = resolve_dsn(dsn)
        self._schema = resolve_schema(schema)
        self._options = read_client_options(options)
        self._lock = threading.Lock()
        self._db: Database | None = None
        self._pid = os.getpid()

    def get_task(self, id: int) -> TaskRecord:  # noqa: A002 - the word that records and tables use
        """The task with its state and its failed attempts. Takes about as long with a million tasks as with ten.

        Raises:
            TaskNotFound: there is none, or it was removed at the end of its retention.
        """
        if id.__class__ is not int:
            raise SettingsError(f"id is {id!r}, but must be a whole number")
        rows = self._read("find_task", id, walk=True) if 0 < id <= _LAST_ID else []
        if not rows:
            raise TaskNotFound(
                f"there is no task {id} in schema {self._schema!r}: it never was, or its retention is over"
            )
        return _to_record(rows[0], with_errors=True)

    def list_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        limit: int = 50,
        order_by: Order = "created_at",
        descending: bool = True,
        after: str | None = None,
    ) -> Page:
        """A page of the tasks that are in one of ``states`` and of one of ``types`` and ``queues`` (None: of any).

        A state is read from its own tables, so asking for ``running`` costs nothing for a million that completed. By ``id`` a page
        takes milliseconds; by ``created_at`` all tasks of the states asked for are looked at, half a second to three a million:
        ids follow the order of enqueueing only roughly, as each producer numbers its tasks from a block of its own.

        Args:
            states: any of the six states, ``"scheduled"`` and ``"retrying"``; ``"pending"`` includes these two.
            types: exact types.
            queues: exact names.
            limit: at most so many tasks, 1 to 10,000.
            order_by: ``"created_at"`` (alike ones by id) or ``"id"``.
            descending: the newest first.
            after: ``next`` of the page before, which was asked for with the same order. A task that is enqueued or changes its state
                between two pages may be in none of them; none is in both unless it changed.
        """
        kinds, running, completed, ends = _parts_of(states)
        if limit.__class__ is not int or not 1 <= limit <= LIMIT:
            raise SettingsError(f"limit is {limit!r}, but must be a whole number from 1 to {LIMIT:,}")
        if order_by not in ("created_at", "id"):
            raise SettingsError(f"order_by is {order_by!r}, but must be 'created_at' or 'id'")
        time, last_id = _from_after(after, order_by, descending=descending)
        lanes = None
        if types is not None or queues is not None:
            lanes = [
                lane
                for (lane,) in self._read("find_lanes", _texts("types", types), _texts("queues", queues), walk=False)
            ]
        # One more than wanted tells whether there are more.
        parts = (limit + 1, last_id, lanes, kinds, running, completed, ends)
        if order_by == "created_at":
            rows = self._read("list_tasks_by_created_at", *parts, time, descending, walk=False)
        elif descending:
            rows = self._read("list_tasks_by_id_descending", *parts, walk=True)
        else:
            rows = self._read("list_tasks_by_id_ascending", *parts, walk=True)
        tasks = tuple(_to_record(row, with_errors=False) for row in rows[:limit])
        more = len(rows) > limit
        return Page(tasks, _to_after(tasks[-1], order_by, descending=descending) if more else None)

    @overload
    def counts(self, by: None = None, *, states: Sequence[State | Kind] | None = None) -> dict[str, int]: ...

    @overload
    def counts(
        self, by: Literal["queue", "type"], *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, dict[str, int]]: ...

    def counts(
        self, by: Literal["queue", "type"] | None = None, *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, int] | dict[str, dict[str, int]]:
        """How many tasks are in each state, all at one moment.

        Args:
            by: split the numbers by queue or type: name → state → number.
            states: which to count; None: the six states. With ``"scheduled"`` or ``"retrying"`` among them these are counted
                apart, and still are part of ``"pending"``.

        Returns:
            State → number, with 0 for a state that no task is in.
        """
        wanted: tuple[State | Kind, ...] = STATES if states is None else tuple(_check_states(states))
        if by not in (None, "queue", "type"):
            raise SettingsError(f"by is {by!r}, but must be None, 'queue' or 'type'")
        split: dict[str, dict[str, int]] = {}
        for queue, type_, found, tasks in self._read("count_tasks", walk=False):
            name = "" if by is None else queue if by == "queue" else type_
            numbers = split.setdefault(name, dict.fromkeys(wanted, 0))
            for state in ("pending", found) if found in _WAITING else (found,):
                if state in numbers:
                    numbers[state] += tasks
        return split if by is not None else split.get("", dict.fromkeys(wanted, 0))

    def close(self) -> None:
        """Close the connection. Idempotent; a later call makes a new one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, query: str, *params: object, walk: bool) -> list[Row]:
        """One statement, on a new connection if the old one turns out to be lost.

        Args:
            query: its name.
            params: its parameters.
            walk: it finds all it needs by indexes, whatever the statistics say.
        """
        with self._lock:
            try:
                return self._read_once(query, params, walk=walk)
            except ConnectionLost as error:
                if was_too_late(error):
                    raise
                # It may have been idle for hours: the loss shows at its next use. Reading twice does no harm.
                return self._read_once(query, params, walk=walk)

    def _read_once(self, query: str, params: Sequence[object], *, walk: bool) -> list[Row]:
        db = self._connection()
        try:
            with db.transaction():
                db.query("set_plan", "off" if walk else "on")
                return db.query(query, *params)
        except ConnectionLost:
            self._drop()
            raise

    def _connection(self) -> Database:
        if self._pid != os.getpid():
            # After a fork the connection is the parent's: leave it alone (closing it would end the parent's session).
            self._db, self._pid = None, os.getpid()
        if self._db is None or self._db.is_closed:
            db = Database(self._dsn, self._schema, **self._options)
            try:
                migrations.check(db, kind="viewer")
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _drop(self) -> None:
        if self._db is not None and self._pid == os.getpid():
            self._db.close()
        self._db = None


def _check_states(states: Sequence[State | Kind]) -> list[State | Kind]:
    words: list[State | Kind] = [*STATES, *KINDS]
    if isinstance(states, str) or any(state not in words for state in states):
        raise SettingsError(f"states is {states!r}, but must be a sequence of some of {', '.join(words)}")
    return list(states)


def _parts_of(states: Sequence[State | Kind] | None) -> tuple[list[str], bool, bool, list[str]]:
    given: Sequence[State | Kind] = STATES if states is None else _check_states(states)
    kinds = [kind for kind in _WAITING if "pending" in given or kind in given]
    return kinds, "running" in given, "completed" in given, [end for end in _ENDED_BADLY if end in given]


def _texts(name: str, values: Sequence[object] | None) -> list[str] | None:
    if values is None:
        return None
    if isinstance(values, str) or not all(isinstance(value, str) and "\0" not in value for value in values):
        raise SettingsError(f"{name} is {values!r}, but must be a sequence of texts without NUL")
    return [str(value) for value in values]


def _to_after(last: TaskRecord, order_by: Order, *, descending: bool) -> str:
    time = (last.created_at - _EPOCH) // timedelta(microseconds=1)
    return f"{order_by}-{'down' if descending else 'up'}-{time}-{last.id}"


def _from_after(after: object, order_by: Order, *, descending: bool) -> tuple[datetime | None, int]:
    if after is None:
        return None, _LAST_ID if descending else 0
    found = _AFTER.fullmatch(after) if isinstance(after, str) else None
    if found is None or found["order"] != order_by or found["way"] != ("down" if descending else "up"):
        raise SettingsError(f"after is {after!r}, but must be `next` of a page that was listed in the same order")
    return _EPOCH + timedelta(microseconds=int(found["time"])), int(found["id"])


def _to_record(row: Row, *, with_errors: bool) -> TaskRecord:
    id_, type_, queue, priority, format_, payload, state, kind, attempts, most, created_at, run_at, ended_at, *more = (
        row
    )
    errors = tuple(
        FailedAttempt(attempt, failed_at.astimezone(UTC), None if took is None else took / 1e6, error, traceback)
        for attempt, failed_at, took, error, traceback in zip(*more, strict=True)
    )
    return TaskRecord(
        id=id_,
        type=type_,
        queue=queue,
        priority=priority,
        payload=json.loads(payload) if format_ == "j" else payload,
        state=state,
        kind=kind,
        attempts=attempts,
        max_attempts=most,
        created_at=created_at.astimezone(UTC),
        run_at=run_at and run_at.astimezone(UTC),
        ended_at=ended_at and ended_at.astimezone(UTC),
        errors=errors if with_errors else None,
    )


__all__ = ["KINDS", "LIMIT", "STATES", "Client", "FailedAttempt", "Kind", "Order", "Page", "State", "TaskRecord"]
