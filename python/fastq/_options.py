"""Settings as a caller gives them: which there are, and what each must be."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final, TypedDict

from fastq.errors import SettingsError
from fastq.retention import ENDED, Archived, Retention, read_archive
from fastq.settings import ClientSettings, ConsumerSettings, ProducerSettings
from fastq.task import to_seconds

# What goes to the engine as a number of 32 bits.
_COUNT_LIMIT: Final = 2**31 - 1
# How long tasks are kept: 0 is allowed.
_KEPT: Final = tuple(f"{name}_retention" for name in ENDED)
_NOT_SINGLE: Final = {"archive", "queue_retention", *_KEPT}
#: Characters of a type, a queue or a token.
NAME_LIMIT: Final = 255


class ConsumerOptions(TypedDict, total=False):
    """A consumer's further settings. Durations are seconds as a number, or a timedelta."""

    prefetch: int
    """Tasks claimed and not yet started, at most (1,000)."""
    prefetch_bytes: int
    """Bytes of their payloads, at most (64 MiB)."""
    heartbeat_interval: float | timedelta
    """How often a living consumer says so (3 s)."""
    dead_after: float | timedelta
    """Silence after which others take a consumer for dead and its tasks run again (9 s); at least two intervals."""
    lease: float | timedelta
    """How long a leader stays one without renewing (6 s)."""
    poll_interval: float | timedelta
    """How often to look for tasks that nothing announced (1 s)."""
    connect_timeout: float | timedelta
    """How long a connection may take (10 s)."""
    statement_timeout: float | timedelta
    """A statement whose answer takes longer counts as a lost connection (30 s)."""
    listen: bool
    """Wake up by LISTEN/NOTIFY (True); off: by polling alone."""
    completed_retention: float | timedelta
    """How long a completed task is kept (24 h); 0, here and below: it is deleted at once."""
    failed_retention: float | timedelta
    """How long a failed task is kept (7 days)."""
    cancelled_retention: float | timedelta
    """How long a cancelled task is kept (24 h)."""
    expired_retention: float | timedelta
    """How long a task is kept that was not begun in time (24 h)."""
    archive: Archived
    """Whether a task goes into the table ``archive`` when its time is over (False), or for which of ``"completed"``, ``"failed"``,
    ``"cancelled"`` and ``"expired"`` it is so. As with the times, what the consumer has that leads counts."""
    queue_retention: Mapping[str, Retention]
    """Queues that keep theirs for times of their own (none do). The times of the consumer that leads count: give all the same."""
    upkeep: bool
    """Whether it may be the one that rescues, promotes and forgets for all (True)."""
    result_limit: int
    """Bytes of one result that is kept for ``result_ttl``, at most (1 MiB)."""
    ageing: int
    """Each so many claims, one takes, in each queue, tasks of one of the lower priorities alone, those in turn (0: none, and a queue's
    tasks of a higher priority keep the lower ones waiting for as long as there are any)."""
    stuck_limit: int
    """Sync handlers whose ``timeout`` is over and that go on all the same, at most (32). Each holds a thread, and another thread has
    taken its place. With one more for 5 seconds, the consumer ends in order, as a stop does, and says why: a new process is rid of them."""


class ProducerOptions(TypedDict, total=False):
    """A producer's further settings. Durations are seconds as a number, or a timedelta."""

    payload_limit: int
    """Bytes of one payload, at most (1 MiB)."""
    connect_timeout: float | timedelta
    """How long a connection may take (10 s)."""
    statement_timeout: float | timedelta
    """A statement whose answer takes longer counts as a lost connection (30 s)."""
    iterable_timeout: float | timedelta
    """``enqueue_many`` rolls back when its iterable gives nothing for this long in an open transaction (60 s)."""
    notify: bool
    """Wake up waiting consumers by NOTIFY (True)."""


class ClientOptions(TypedDict, total=False):
    """A client's further settings. Durations are seconds as a number, or a timedelta."""

    connect_timeout: float | timedelta
    """How long a connection may take (10 s)."""
    statement_timeout: float | timedelta
    """A statement whose answer takes longer counts as a lost connection (30 s)."""


class MigrationOptions(TypedDict, total=False):
    """How long a migration may wait for the database. Durations are seconds as a number, or a timedelta."""

    connect_timeout: float | timedelta
    """How long a connection may take (10 s)."""
    statement_timeout: float | timedelta | None
    """A statement whose answer takes longer counts as a lost connection (None: a step takes as long as its tables are large)."""


def read_consumer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``given`` and bring durations to seconds. Raises SettingsError."""
    single = {name: value for name, value in given.items() if name not in _NOT_SINGLE}
    options = _read(ConsumerSettings, ConsumerOptions.__annotations__, single)
    for name in _KEPT:
        if name in given:
            options[name] = read_seconds(name, given[name])
    if "archive" in given:
        options["archive"] = read_archive("archive", given["archive"])
    if "queue_retention" in given:
        options["queue_retention"] = _read_queue_retention(given["queue_retention"], options)
    beat = options.get("heartbeat_interval", 3.0)
    for name, default in (("dead_after", 9.0), ("lease", 6.0)):
        value = options.get(name, default)
        if value < 2 * beat:
            raise SettingsError(f"{name} is {value:g} s, but must be at least twice heartbeat_interval ({beat:g} s)")
    return options


def _read_queue_retention(
    given: object, options: Mapping[str, Any]
) -> list[tuple[str, tuple[float, ...], tuple[bool, ...]]]:
    """Each queue with its four times in seconds, and whether what is over is archived: as the consumer has it where it says nothing.

    Raises SettingsError.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ConsumerSettings)} | dict(
        options
    )
    if not isinstance(given, Mapping):
        raise SettingsError(f"queue_retention is {given!r}, but must be a mapping of queues to Retention(…)")
    found = []
    for queue, kept in given.items():
        read_name("a queue in queue_retention", queue)
        if not isinstance(kept, Retention):
            raise SettingsError(f"queue_retention[{queue!r}] is {kept!r}, but must be a Retention(…)")
        times = tuple(
            defaults[f"{name}_retention"] if (value := getattr(kept, name)) is None else value for name in ENDED
        )
        archived = defaults["archive"] if kept.archive is None else read_archive("archive", kept.archive)
        found.append((queue, times, archived))
    return found


def read_producer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``given`` and bring durations to seconds. Raises SettingsError."""
    return _read(ProducerSettings, ProducerOptions.__annotations__, given)


def read_client_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``given`` and bring durations to seconds. Raises SettingsError."""
    return _read(ClientSettings, ClientOptions.__annotations__, given)


def read_migration_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``given``, bring durations to seconds and add the defaults. Raises SettingsError."""
    unlimited = {name: value for name, value in given.items() if (name, value) != ("statement_timeout", None)}
    return {"statement_timeout": None} | read_client_options(unlimited)


def _read(settings: type, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    names = list(names)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in names:
            raise SettingsError(_unknown(name, value, names))
        default = defaults[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise SettingsError(f"{name} is {value!r}, but must be True or False")
            options[name] = value
        elif isinstance(default, int):
            options[name] = read_count(name, value, least=min(default, 1))
        else:
            options[name] = read_duration(name, value)
    return options


def _unknown(name: str, value: object, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
    return f"unknown setting {name} (given as {value!r}): {hint}"


def read_count(name: str, value: object, *, least: int = 1) -> int:
    """A whole number of at least ``least``. Raises SettingsError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _COUNT_LIMIT:
        raise SettingsError(f"{name} is {value!r}, but must be a whole number, {least} to {_COUNT_LIMIT:,}")
    return value


def read_duration(name: str, value: object) -> float:
    """Seconds above 0, from a number or a timedelta. Raises SettingsError."""
    try:
        seconds = to_seconds(name, value)
    except TypeError as error:
        raise SettingsError(str(error)) from None
    if seconds == 0:
        raise SettingsError(f"{name} is {value!r}, but must be more than 0 seconds")
    return seconds


def read_seconds(name: str, value: object) -> float:
    """Seconds, 0 included, from a number or a timedelta. Raises SettingsError."""
    try:
        return to_seconds(name, value)
    except TypeError as error:
        raise SettingsError(str(error)) from None


def read_name(what: str, value: object) -> str:
    """A type's or a queue's name: 1 to 255 characters without NUL. Raises SettingsError."""
    if not isinstance(value, str):
        raise SettingsError(f"{what} is {value!r}, but must be a str")
    if not 1 <= len(value) <= NAME_LIMIT:
        raise SettingsError(f"{what} has {len(value):,} characters, but must have 1 to {NAME_LIMIT}: {value[:40]!r}")
    if "\0" in value:
        raise SettingsError(f"{what} is {value!r}, but must hold no NUL character")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise SettingsError(f"{what} is {value!r}, but must hold no lone surrogate")
    return value


__all__ = [
    "NAME_LIMIT",
    "ClientOptions",
    "ConsumerOptions",
    "MigrationOptions",
    "ProducerOptions",
    "read_client_options",
    "read_consumer_options",
    "read_count",
    "read_duration",
    "read_migration_options",
    "read_name",
    "read_producer_options",
    "read_seconds",
]
