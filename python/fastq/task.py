"""A task before it is enqueued, and what enqueueing answers."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from fastq.errors import SettingsError

#: Runs in all that a task gets unless it says otherwise.
MAX_ATTEMPTS: Final = 3
#: The column is a smallint.
MAX_ATTEMPTS_LIMIT: Final = 32_767
#: The priority that a task gets unless it says otherwise, which is the lowest.
PRIORITY: Final = 0
#: The highest.
PRIORITY_LIMIT: Final = 9
#: No duration may be longer, in seconds: a century.
DURATION_LIMIT: Final = 36_525 * 86_400.0


def to_seconds(name: str, value: object) -> float:
    """A duration in seconds, from a number or a timedelta.

    Raises:
        SettingsError: it is negative, not finite, or over a century.
        TypeError: it is something else.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # An int may be too large for a float.
        seconds = float(value) if abs(value) <= DURATION_LIMIT else math.nan
    else:
        raise TypeError(f"{name} is {value!r}, but must be seconds or a timedelta")
    if not 0 <= seconds <= DURATION_LIMIT:
        raise SettingsError(f"{name} is {value!r}, but must be from 0 to {DURATION_LIMIT:.0f} seconds")
    return seconds


class Task:
    """What is to be done: the type that names its handler, a payload, and when and how often to try.

    Args:
        type: ties the task to its handler; 1 to 255 characters.
        payload: anything that JSON can hold, or raw ``bytes``; at most 1 MiB encoded (a producer's setting).
        queue: the name under which consumers pick it; 1 to 255 characters.
        priority: 0 to 9; within its queue the higher is claimed first.
        delay: seconds, or a timedelta, until it may start, counted by the database's clock from its enqueue.
        run_at: not before this time (aware); it wins over ``delay``, and a time gone by means now.
        max_attempts: runs in all, 1 to 32,767, before it fails for good.
        idempotency_token: unique for its type while the task is kept; a second enqueue answers its id.

    Raises:
        SettingsError: a delay that is negative, not finite or over a century, a naive ``run_at``, a ``priority`` or ``max_attempts``
            out of range. Lengths and the payload are checked at enqueue.
    """

    __slots__ = ("delay", "idempotency_token", "max_attempts", "payload", "priority", "queue", "run_at", "type")

    type: str
    payload: Any
    queue: str
    priority: int
    delay: float | None
    run_at: datetime | None
    max_attempts: int
    idempotency_token: str | None

    def __init__(
        self,
        type: str,  # noqa: A002 - the word that tables, JSON Lines and settings use
        payload: object = None,
        *,
        queue: str = "default",
        priority: int = PRIORITY,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        idempotency_token: str | None = None,
    ) -> None:
        # A million of these are made in a row: only what is given is looked at.
        self.type = type
        self.payload = payload
        self.queue = queue
        if priority is not PRIORITY:
            check_priority(priority)
        self.priority = priority
        self.delay = None if delay is None else to_seconds("delay", delay)
        if run_at is not None:
            check_aware("run_at", run_at)
        self.run_at = run_at
        if max_attempts.__class__ is not int or not 1 <= max_attempts <= MAX_ATTEMPTS_LIMIT:
            raise SettingsError(
                f"max_attempts is {max_attempts!r}, but must be a whole number, 1 to {MAX_ATTEMPTS_LIMIT:,}"
            )
        self.max_attempts = max_attempts
        self.idempotency_token = idempotency_token

    def __repr__(self) -> str:
        # Without the payload: it may hold what no log should.
        given = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("queue", self.queue, "default"),
                ("priority", self.priority, PRIORITY),
                ("delay", self.delay, None),
                ("run_at", self.run_at, None),
                ("max_attempts", self.max_attempts, MAX_ATTEMPTS),
                ("idempotency_token", self.idempotency_token, None),
            )
            if value != default
        )
        return f"Task({self.type!r}, ...{given})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Task.__slots__)

    __hash__ = None  # type: ignore[assignment]  # mutable, and payloads seldom can be hashed


def check_aware(name: str, value: object) -> None:
    """That it is an aware datetime.

    Raises:
        SettingsError: it is a naive one.
        TypeError: it is something else.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{name} is {value!r}, but must be an aware datetime")
    if value.utcoffset() is None:
        raise SettingsError(f"{name} is {value!r}, a naive datetime, but must be aware: give it a tzinfo")


def check_priority(value: object) -> None:
    """That it is a priority. Raises SettingsError."""
    if value.__class__ is not int or not PRIORITY <= value <= PRIORITY_LIMIT:
        raise SettingsError(f"priority is {value!r}, but must be a whole number, {PRIORITY} to {PRIORITY_LIMIT}")


class Enqueued(NamedTuple):
    """What enqueueing a task answers."""

    id: int
    """The task's id; where it was a duplicate, the id of the task that holds its token."""
    is_new: bool
    """False: a task with this type and idempotency token was there before, and nothing was written."""


__all__ = [
    "DURATION_LIMIT",
    "MAX_ATTEMPTS",
    "MAX_ATTEMPTS_LIMIT",
    "PRIORITY",
    "PRIORITY_LIMIT",
    "Enqueued",
    "Task",
    "check_aware",
    "check_priority",
    "to_seconds",
]
