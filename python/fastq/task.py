"""A task before it is enqueued, and what enqueueing answers."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, get_args

from fastq._durations import DURATION_LIMIT, to_seconds
from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._backoff import Backoff

#: Runs in all that a task gets unless it says otherwise.
MAX_ATTEMPTS: Final = 3
#: The column is a smallint.
MAX_ATTEMPTS_LIMIT: Final = 32_767
#: The priority that a task gets unless it says otherwise, which is the lowest.
PRIORITY: Final = 0
#: The highest.
PRIORITY_LIMIT: Final = 9
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
    and change that task while it waits: ``"replace"`` its payload (with its own ``timeout`` and ``retry``) and, where the new task has a
    delay or a time, its time; ``"replace_payload"`` or ``"replace_time"`` only the one."""


class TaskKeywords(TokenKeywords, total=False):
    """What most tasks do without, as `Task` takes it."""

    priority: int
    """0 to 9; within its queue the higher is claimed first."""
    delay: float | timedelta | None
    """Seconds, or a timedelta, until it may start, counted by the database's clock from its enqueue."""
    run_at: datetime | None
    """Not before this time (aware); it wins over ``delay``, and a time gone by means now."""
    expires_at: datetime | None
    """No run of it, a retry neither, starts after this time (aware), by the database's clock: it ends as expired. None: never."""
    timeout: float | timedelta | None
    """Seconds, above 0, after which an attempt of it ends as failed, whatever its type's timeout is."""
    retry: Backoff | None
    """How long it waits after an attempt that failed, an `ExponentialBackoff` or a `ConstantBackoff`, whatever its type has."""


class TokenOptions(NamedTuple):
    """How a task's token is meant, checked. The engine reads it as a tuple."""

    scope: TokenScope = "type"
    until: TokenUntil = "removed"
    ttl: float | None = None
    """Seconds."""
    on_conflict: OnConflict = "existing"


class Extras(NamedTuple):
    """What most tasks do without, checked. The engine reads it as a tuple."""

    priority: int = PRIORITY
    delay: float | None = None
    """Seconds."""
    run_at: datetime | None = None
    expires_at: datetime | None = None
    token_options: TokenOptions | None = None
    timeout: float | None = None
    """Seconds."""
    retry: Backoff | None = None


_NONE: Final = Extras()


def _read_extras(token: str | None, given: TaskKeywords) -> Extras | None:
    """None where all is as it is by default.

    Raises:
        SettingsError: a naive time, a number out of range, or a wrong option of the token.
        TypeError: an option that there is not, or a value of another type.
    """
    if unknown := given.keys() - TaskKeywords.__annotations__.keys():
        raise TypeError(f"Task() got an unexpected keyword argument {min(unknown)!r}")
    priority, delay, run_at = given.pop("priority", PRIORITY), given.pop("delay", None), given.pop("run_at", None)
    expires_at = given.pop("expires_at", None)
    timeout, retry = given.pop("timeout", None), given.pop("retry", None)
    check_priority(priority)
    if delay is not None:
        delay = to_seconds("delay", delay)
    if run_at is not None:
        check_aware("run_at", run_at)
    if expires_at is not None:
        check_aware("expires_at", expires_at)
    if timeout is not None:
        timeout = _above_0("timeout", timeout)
    if retry is not None:
        # What most tasks do without needs no import either.
        from fastq._backoff import check_backoff  # noqa: PLC0415

        check_backoff(retry)
    token_options = _read_token(token, given) if given else None
    extras = Extras(priority, delay, run_at, expires_at, token_options, timeout, retry)
    return None if extras == _NONE else extras


def _read_token(token: str | None, given: TokenKeywords) -> TokenOptions | None:
    """None where all is as it is by default.

    Raises:
        SettingsError: a value that is none of an option's, a ``token_ttl`` out of range, or no token.
        TypeError: a ``token_ttl`` of another type.
    """
    if token is None:
        raise SettingsError(f"{', '.join(given)} without an idempotency_token: it would do nothing")
    ttl = given.get("token_ttl")
    if ttl is not None:
        ttl = _above_0("token_ttl", ttl)
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


def _above_0(name: str, value: float | timedelta) -> float:
    seconds = to_seconds(name, value)
    if seconds == 0:
        raise SettingsError(f"{name} is 0, but must be more than 0 seconds")
    return seconds


class Task:
    """What is to be done: the type that names its handler, a payload, and when and how often to try.

    Args:
        type: ties the task to its handler; 1 to 255 characters.
        payload: anything that JSON can hold, or raw ``bytes``; at most 1 MiB encoded (a producer's setting).
        queue: the name under which consumers pick it; 1 to 255 characters.
        max_attempts: runs in all, 1 to 32,767, before it fails for good.
        idempotency_token: unique for its type while the task is kept; a second enqueue answers its id.
        **more: ``priority``: 0 to 9; within its queue the higher is claimed first.
            ``delay``: seconds, or a timedelta, until it may start, counted by the database's clock from its enqueue.
            ``run_at``: not before this time (aware); it wins over ``delay``, and a time gone by means now.
            ``expires_at``: no run of it, a retry neither, starts after this time (aware), by the database's clock: it ends as expired.
            ``timeout`` (seconds, or a timedelta) and ``retry`` (an `ExponentialBackoff` or a `ConstantBackoff`) of this task alone,
            stored with it: they win over its type's and its consumer's, see docs/tasks.md. And how the token is meant, where it is
            otherwise: ``token_scope``, ``token_until``, ``token_ttl``, ``on_conflict``, see `TokenKeywords` and docs/tokens.md.

    Raises:
        SettingsError: a delay that is negative, not finite or over a century, a naive ``run_at`` or ``expires_at``, a ``priority``,
            ``max_attempts`` or ``timeout`` out of range, a wrong option of the token, or one without a token. Lengths and the payload
            are checked at enqueue.
        TypeError: a value of another type, a ``retry`` that can't be stored, or an option that there is not.
    """

    __slots__ = (
        "_extras",
        "idempotency_token",
        "max_attempts",
        "payload",
        "queue",
        "type",
    )

    type: str
    payload: Any
    queue: str
    max_attempts: int
    idempotency_token: str | None
    # One slot for all that most tasks do without: the engine looks at each slot of each task.
    _extras: Extras | None

    def __init__(
        self,
        type: str,  # noqa: A002 - the word that tables, JSON Lines and settings use
        payload: object = None,
        *,
        queue: str = "default",
        max_attempts: int = MAX_ATTEMPTS,
        idempotency_token: str | None = None,
        **more: Unpack[TaskKeywords],
    ) -> None:
        # A million of these are made in a row: only what is given is looked at, and what is seldom given is no parameter, each of
        # which Python fills in.
        self.type = type
        self.payload = payload
        self.queue = queue
        if max_attempts is not MAX_ATTEMPTS:
            _check_max_attempts(max_attempts)
        self.max_attempts = max_attempts
        self.idempotency_token = idempotency_token
        self._extras = _read_extras(idempotency_token, more) if more else None

    def _extra(self, **changed: Any) -> None:
        # As other attributes: what is put in place of what was checked here is refused by the engine.
        extras = (self._extras or _NONE)._replace(**changed)
        self._extras = None if extras == _NONE else extras

    @property
    def priority(self) -> int:
        """0 to 9; within its queue the higher is claimed first."""
        return (self._extras or _NONE).priority

    @priority.setter
    def priority(self, value: int) -> None:
        self._extra(priority=value)

    @property
    def delay(self) -> float | None:
        """Seconds until it may start, counted from its enqueue; None: it may at once."""
        return (self._extras or _NONE).delay

    @delay.setter
    def delay(self, value: float | None) -> None:
        self._extra(delay=value)

    @property
    def run_at(self) -> datetime | None:
        """When it may start; it wins over `delay`."""
        return (self._extras or _NONE).run_at

    @run_at.setter
    def run_at(self, value: datetime | None) -> None:
        self._extra(run_at=value)

    @property
    def expires_at(self) -> datetime | None:
        """No run of it starts after this time; None: it never expires."""
        return (self._extras or _NONE).expires_at

    @expires_at.setter
    def expires_at(self, value: datetime | None) -> None:
        self._extra(expires_at=value)

    @property
    def token_options(self) -> TokenOptions | None:
        """How its token is meant; None: all as by default."""
        return (self._extras or _NONE).token_options

    @token_options.setter
    def token_options(self, value: TokenOptions | None) -> None:
        self._extra(token_options=value)

    @property
    def timeout(self) -> float | None:
        """Seconds that an attempt of it may take; None: as its type has it."""
        return (self._extras or _NONE).timeout

    @timeout.setter
    def timeout(self, value: float | None) -> None:
        self._extra(timeout=value)

    @property
    def retry(self) -> Backoff | None:
        """How long it waits after an attempt that failed; None: as its type has it."""
        return (self._extras or _NONE).retry

    @retry.setter
    def retry(self, value: Backoff | None) -> None:
        self._extra(retry=value)

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
                ("timeout", self.timeout, None),
                ("retry", self.retry, None),
            )
            if value != default
        )
        return f"Task({self.type!r}, ...{given})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Task.__slots__)

    __hash__ = None  # type: ignore[assignment]  # mutable, and payloads seldom can be hashed


def _check_max_attempts(value: object) -> None:
    if value.__class__ is not int or not 1 <= value <= MAX_ATTEMPTS_LIMIT:
        raise SettingsError(f"max_attempts is {value!r}, but must be a whole number, 1 to {MAX_ATTEMPTS_LIMIT:,}")


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
    "Extras",
    "OnConflict",
    "Task",
    "TaskKeywords",
    "TokenKeywords",
    "TokenOptions",
    "TokenScope",
    "TokenUntil",
    "check_aware",
    "check_priority",
    "to_seconds",
]
