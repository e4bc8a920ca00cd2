"""What the client answers, and the words for states: where in the storage a task of each is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

from fastq._backoff import Backoff, from_words
from fastq._durations import to_seconds
from fastq.errors import SettingsError

State: TypeAlias = Literal["pending", "running", "completed", "failed", "cancelled", "expired"]
Kind: TypeAlias = Literal["scheduled", "retrying"]

STATES: Final[tuple[State, ...]] = ("pending", "running", "completed", "failed", "cancelled", "expired")
KINDS: Final[tuple[Kind, ...]] = ("scheduled", "retrying")

#: No id is as high: a range of ids ends before a number.
LAST_ID: Final = 2**63 - 1

#: What waits, by the storage's words: in chunks, for its own time, for its backoff.
WAITING: Final = ("ready", *KINDS)
ENDED_BADLY: Final = ("failed", "cancelled", "expired")


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
    expires_at: datetime | None = None
    """If it has not been started by then, it expires; None: it never does."""
    timeout: float | None = None
    """Seconds that an attempt may take, of its own; None: as its type has it."""
    retry: Backoff | None = None
    """How long it waits after an attempt that failed, of its own; None: as its type has it."""
    errors: tuple[FailedAttempt, ...] | None = None
    """Its failed attempts, the first one first; None in a list: ``get_task`` brings them."""


@dataclass(frozen=True, slots=True)
class ConsumerRecord:
    """A consumer as it was when it was looked at. Times are aware, UTC, by the database's clock."""

    id: int
    """New with each registration; what it claimed, completed and failed bears it in the tables."""
    host: str
    pid: int
    version: str
    """Its fastq's."""
    started_at: datetime
    beat_at: datetime
    """When it last said that it lives."""
    dead_at: datetime | None
    """When it was declared dead, after a silence: what it held runs again. None: it lives, as far as is known."""
    is_stopping: bool
    """It claims no more."""
    is_leader: bool
    """It does the upkeep for all."""
    types: tuple[str, ...]
    """What it has handlers for; ending in ``*``: all that begin alike."""
    queues: tuple[str, ...] | None
    """What it takes tasks from; None: all."""
    running: tuple[int, ...]
    """The tasks whose handlers ran at its last heartbeat."""
    claimed: int
    """How many tasks it holds: those that run, and those that are next."""
    refused: int
    """Results of its that did not count: the task was cancelled, or others had it."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list of tasks. Iterating gives the tasks."""

    tasks: tuple[TaskRecord, ...]
    next: str | None
    """For ``after`` of the call that goes on, also from a page that is short or empty; None: there are no more."""

    def __iter__(self) -> Iterator[TaskRecord]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True, slots=True)
class Places:
    """Parts of the storage: those of some states."""

    kinds: tuple[str, ...] = ()
    """Of what waits: some of `WAITING`."""
    running: bool = False
    completed: bool = False
    ends: tuple[str, ...] = ()
    """Some of `ENDED_BADLY`."""

    @property
    def params(self) -> tuple[list[str], bool, bool, list[str]]:
        """As statements take them."""
        return list(self.kinds), self.running, self.completed, list(self.ends)

    def __and__(self, other: Places) -> Places:
        return Places(
            tuple(kind for kind in self.kinds if kind in other.kinds),
            self.running and other.running,
            self.completed and other.completed,
            tuple(end for end in self.ends if end in other.ends),
        )

    def __contains__(self, place: str) -> bool:
        """Whether a place, as ``locate_tasks`` names it, is one of them."""
        return (
            place in self.kinds
            or place in self.ends
            or (place == "running" and self.running)
            or (place == "completed" and self.completed)
        )

    def __bool__(self) -> bool:
        return bool(self.kinds or self.running or self.completed or self.ends)


def to_consumer(row: Sequence[Any]) -> ConsumerRecord:
    """A row of list_consumers.sql."""
    id_, host, pid, version, started_at, beat_at, dead_at, stopping, types, queues, leads, running, claimed, refused = (
        row
    )
    return ConsumerRecord(
        id=id_,
        host=host,
        pid=pid,
        version=version,
        started_at=started_at.astimezone(UTC),
        beat_at=beat_at.astimezone(UTC),
        dead_at=dead_at.astimezone(UTC) if dead_at is not None else None,
        is_stopping=stopping,
        is_leader=leads,
        types=tuple(types),
        queues=tuple(queues) if queues is not None else None,
        running=tuple(running),
        claimed=claimed,
        refused=refused,
    )


def check_states(states: Sequence[State | Kind]) -> list[State | Kind]:
    """The states as a list.

    Raises:
        SettingsError: not a sequence of states and kinds.
    """
    words: list[State | Kind] = [*STATES, *KINDS]
    if isinstance(states, str) or any(state not in words for state in states):
        raise SettingsError(f"states is {states!r}, but must be a sequence of some of {', '.join(words)}")
    return list(states)


def places_of(states: Sequence[State | Kind] | None) -> Places:
    """Where the tasks in these states are (None: in any).

    Raises:
        SettingsError: not a sequence of states and kinds.
    """
    given: Sequence[State | Kind] = STATES if states is None else check_states(states)
    return Places(
        tuple(kind for kind in WAITING if "pending" in given or kind in given),
        "running" in given,
        "completed" in given,
        tuple(end for end in ENDED_BADLY if end in given),
    )


def _read_content(format_: str, stored: bytes) -> tuple[Any, float | None, Backoff | None]:
    """The payload, and the task's own timeout and retry policy, which are stored in a line before it (formats J and B)."""
    if format_ not in ("J", "B"):
        return json.loads(stored) if format_ == "j" else stored, None, None
    line, end, rest = stored.partition(b"\n")
    if not end:
        # Nobody knows where the payload begins. A list is shown all the same.
        return stored, None, None
    payload = json.loads(rest) if format_ == "J" else rest
    try:
        words = json.loads(line)
        timeout, retry = words.get("timeout"), words.get("retry")
        return (
            payload,
            None if timeout is None else to_seconds("timeout", timeout),
            None if retry is None else from_words(retry),
        )
    except (ValueError, RecursionError, AttributeError, TypeError, SettingsError):
        # Damaged: no worker runs it.
        return payload, None, None


def to_record(row: tuple[Any, ...], *, with_errors: bool) -> TaskRecord:
    """A row of ``find_task`` (with its failed attempts) or of a list."""
    (
        id_,
        type_,
        queue,
        priority,
        format_,
        payload,
        state,
        kind,
        attempts,
        most,
        created_at,
        run_at,
        ended_at,
        expires_at,
        *more,
    ) = row
    errors = tuple(
        FailedAttempt(attempt, failed_at.astimezone(UTC), None if took is None else took / 1e6, error, traceback)
        for attempt, failed_at, took, error, traceback in zip(*more, strict=True)
    )
    content, timeout, retry = _read_content(format_, payload)
    return TaskRecord(
        id=id_,
        type=type_,
        queue=queue,
        priority=priority,
        payload=content,
        state=state,
        kind=kind,
        attempts=attempts,
        max_attempts=most,
        created_at=created_at.astimezone(UTC),
        run_at=run_at and run_at.astimezone(UTC),
        ended_at=ended_at and ended_at.astimezone(UTC),
        expires_at=expires_at and expires_at.astimezone(UTC),
        timeout=timeout,
        retry=retry,
        errors=errors if with_errors else None,
    )


__all__ = [
    "ENDED_BADLY",
    "KINDS",
    "LAST_ID",
    "STATES",
    "WAITING",
    "ConsumerRecord",
    "FailedAttempt",
    "Kind",
    "Page",
    "Places",
    "State",
    "TaskRecord",
    "check_states",
    "places_of",
    "to_consumer",
    "to_record",
]
