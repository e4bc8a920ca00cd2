"""Settings: what they are called, their defaults and limits, and where each comes from (argument, then environment, then default)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from fastq.errors import SettingsError

#: A payload may be at most this many bytes unless the producer is told otherwise.
PAYLOAD_LIMIT = 1024 * 1024
#: A result that is kept may be at most this many bytes unless the consumer is told otherwise.
RESULT_LIMIT = 1024 * 1024


def resolve_dsn(dsn: str | None) -> str:
    """``dsn``, else FASTQ_DSN.

    Raises:
        SettingsError: neither is given, or it is no text.
    """
    found = dsn if dsn is not None else os.environ.get("FASTQ_DSN")
    if found:
        # Not shown: it may hold a password.
        _check_text("dsn", found, "<not shown>")
    if not found:
        raise SettingsError(
            "no database is named: give a dsn such as postgresql://user@host/database, or set FASTQ_DSN"
        )
    return found


def resolve_schema(schema: str | None) -> str:
    """``schema``, else FASTQ_SCHEMA, else ``"fastq"``.

    Raises:
        SettingsError: it is no text.
    """
    found = schema if schema is not None else os.environ.get("FASTQ_SCHEMA", "fastq")
    _check_text("schema", found, repr(found))
    return found


def _check_text(name: str, value: object, shown: str) -> None:
    if not isinstance(value, str):
        raise SettingsError(f"{name} is a {type(value).__name__}, but must be a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{name} is {shown}, which holds a lone surrogate: no text that can be stored") from None


@dataclass(slots=True, frozen=True)
class TypeSettings:
    """One type that a consumer handles, or many."""

    type: str
    """Its name; ending in ``*``: all that begin with what stands before it."""
    is_async: bool
    workers: int | None = None
    """At most this many of its handlers run at once; None: no cap of its own."""
    timeout: float | None = None
    """Seconds after which an attempt ends as failed; None: never."""
    result_ttl: float | None = None
    """Seconds that what its handlers return is kept; None: it is not."""


@dataclass(slots=True)
class ConsumerSettings:
    """All that an engine is told. Durations are seconds."""

    dsn: str
    schema: str
    types: list[TypeSettings] = field(default_factory=list)
    queues: list[str] | None = None
    concurrency: int = 32
    prefetch: int = 1000
    """Tasks claimed and not yet started, at most, in the whole process."""
    prefetch_bytes: int = 64 * 1024 * 1024
    heartbeat_interval: float = 3.0
    dead_after: float = 9.0
    lease: float = 6.0
    poll_interval: float = 1.0
    connect_timeout: float = 10.0
    statement_timeout: float = 30.0
    """A statement whose answer takes longer counts as a lost connection."""
    listen: bool = True
    """Wake up by LISTEN/NOTIFY; off: by polling alone."""
    completed_retention: float = 86_400.0
    failed_retention: float = 7 * 86_400.0
    cancelled_retention: float = 86_400.0
    expired_retention: float = 86_400.0
    archive: tuple[bool, bool, bool, bool] = (False, False, False, False)
    """Whether what is over is archived, in the order above."""
    queue_retention: list[tuple[str, tuple[float, ...], tuple[bool, ...]]] = field(default_factory=list)
    """Queue, its own four times, and its own four answers."""
    upkeep: bool = True
    """It may be the one that rescues, promotes and forgets for all."""
    result_limit: int = RESULT_LIMIT
    """Bytes of one result that is kept."""
    ageing: int = 0
    """Each so many claims, one of a lower priority alone; 0: none."""
    stuck_limit: int = 32
    """Sync handlers that go on although their time is up, at most: one more, and the consumer ends by itself."""


@dataclass(slots=True)
class ProducerSettings:
    """All that a producer's core is told. Durations are seconds."""

    dsn: str
    schema: str
    payload_limit: int = PAYLOAD_LIMIT
    connect_timeout: float = 10.0
    statement_timeout: float = 30.0
    iterable_timeout: float = 60.0
    """enqueue_many rolls back when its iterable gives nothing for this long while its transaction is open."""
    notify: bool = True


@dataclass(slots=True)
class ClientSettings:
    """How long a client waits for its connection. Durations are seconds."""

    connect_timeout: float = 10.0
    statement_timeout: float = 30.0
    """A statement whose answer takes longer counts as a lost connection."""


__all__ = [
    "PAYLOAD_LIMIT",
    "RESULT_LIMIT",
    "ClientSettings",
    "ConsumerSettings",
    "ProducerSettings",
    "SettingsError",
    "TypeSettings",
    "resolve_dsn",
    "resolve_schema",
]
