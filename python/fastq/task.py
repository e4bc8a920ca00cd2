"""A task before it is enqueued, and what enqueueing answers."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, get_args

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


#: Among which tasks a token is unique.
TokenScope: TypeAlias = Literal["type", "queue", "global"]
#: What frees it: the end of its task's retention, or its task's end.
TokenUntil: TypeAlias = Literal["removed", "ended"]
#: What an enqueue does that meets it.
OnConflict: TypeAlias = Literal["existing", "raise", "replace", "replace_payload", "replace_time"]


class TokenKeywords(TypedDict, total=False):
    """How a task's idempotency token is meant, as `Task` takes it."""

    token_scope: TokenScope
    """Unique among the tasks of its type (the default), of its queue, or all."""
    token_until: TokenUntil
    """Held until its task is removed at the end of its retention (``"removed"``, the default), or until it has ended, however."""
    token_ttl: float | timedelta | None
    """Held no longer than this, in seconds, above 0; alone, it is held for just so long, whether its task is kept or not."""
    on_conflict: OnConflict
    """Where it is held: answer the id of the task that has it (``"existing"``, the default), raise `DuplicateTask`, or answer the id
    and change that task while it waits: ``"replace"`` its payload and, where the new task has a delay or a time, its time;
    ``"replace_payload"`` or ``"replace_time"`` only the one."""


class TokenOptions(NamedTuple):
    """How a task's token is meant, checked. The engine reads it as a tuple."""

    scope: TokenScope = "type"
    until: TokenUntil = "removed"
    ttl: float | None = None
    """Seconds."""
    on_conflict: OnConflict = "existing"


def _read_token(token: str | None, given: TokenKeywords) -> TokenOptions | None:
    """None where all is as it is by default.

    Raises:
        SettingsError: a value that is none of an option's, a ``token_ttl`` out of range, or no token.
        TypeError: an option that there is not, or a ``token_ttl`` of another type.
    """
    if unknown := given.keys() - TokenKeywords.__annotations__.keys():
        raise TypeError(f"Task() got an unexpected keyword argument {min(unknown)!r}")
    if token is None:
        raise SettingsError(f"{', '.join(given)} without an idempotency_token: it would do nothing")
    ttl = given.get("token_ttl")
    if ttl is not None:
        ttl = to_seconds("token_ttl", ttl)
        if ttl == 0:
            raise SettingsError("token_ttl is 0, but must be more than 0 seconds")
    options = TokenOptions(
        given.get("token_scope", "type"), given.get("token_until", "removed"), ttl, given.get("on_conflict", "existing")
    )
    for name, value, allowed in (
        ("token_scope", options.scope, TokenScope),
        ("token_until", options.until, TokenUntil),
        ("on_conflict", options.on_conflict, OnConflict),
    ):
        if value not in get_args(allowed):
            raise SettingsError(f"{name} is {value!r:.100}, but must be one of {', '.join(get_args(allowed))}")
    return None if options == TokenOptions() else options


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
        expires_at: no run of it, a retry neither, starts after this time (aware), by the database's clock: it ends as expired. None: never.
        idempotency_token: unique for its type while the task is kept; a second enqueue answers its id.
        **token: how the token is meant, where it is otherwise: ``token_scope``, ``token_until``, ``token_ttl``, ``on_conflict``, see
            `TokenKeywords` and docs/tokens.md.

    Raises:
        SettingsError: a delay that is negative, not finite or over a century, a naive ``run_at`` or ``expires_at``, a ``priority`` or
            ``max_attempts`` out of range, a wrong option of the token, or one without a token. Lengths and the payload are checked at
            enqueue.
        TypeError: a value of another type, or an option that there is not.
    """

    __slots__ = (
        "delay",
        "expires_at",
        "idempotency_token",
        "max_attempts",
        "payload",
        "priority",
        "queue",
        "run_at",
        "token_options",
        "type",
    )

    type: str
    payload: Any
    queue: str
    priority: int
    delay: float | None
    run_at: datetime | None
    max_attempts: int
    expires_at: datetime | None
    idempotency_token: str | None
    token_options: TokenOptions | None
    """None: all as by default."""

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
        expires_at: datetime | None = None,
        idempotency_token: str | None = None,
        **token: Unpack[TokenKeywords],
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
        if expires_at is not None:
            check_aware("expires_at", expires_at)
        self.expires_at = expires_at
        self.idempotency_token = idempotency_token
        self.token_options = _read_token(idempotency_token, token) if token else None

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
                ("expires_at", self.expires_at, None),
                ("idempotency_token", self.idempotency_token, None),
                ("token_options", self.token_options, None),
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
    """False: a task has this idempotency token, and nothing was written but what ``on_conflict`` replaces."""


__all__ = [
    "DURATION_LIMIT",
    "MAX_ATTEMPTS",
    "MAX_ATTEMPTS_LIMIT",
    "PRIORITY",
    "PRIORITY_LIMIT",
    "Enqueued",
    "OnConflict",
    "Task",
    "TokenKeywords",
    "TokenOptions",
    "TokenScope",
    "TokenUntil",
    "check_aware",
    "check_priority",
    "to_seconds",
]
