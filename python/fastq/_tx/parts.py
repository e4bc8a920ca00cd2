"""What a session on somebody else's connection can do, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Protocol

from fastq import _engine
from fastq.errors import CompletionError, EnqueueError, FastqError

#: The rows of a statement in `sql/queries/*_tx.sql`: one row of arrays of numbers.
Answer = list[list[int]]


class Wake(Protocol):
    """Called when the transaction was committed, or is about to be."""

    def __call__(self, *, is_committed: bool) -> None: ...


#: What `copy_tasks.sql` names: for drivers that write COPY by themselves.
COPY_COLUMNS: Final = ("id", "lane", "leaf", "max_attempts", "format", "payload")


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a session is wanted for, in the words of its errors."""

    error: type[FastqError]
    sync: str
    """The call for sync connections."""
    asynchronous: str
    """And for async ones."""
    sync_names: str
    """All calls for sync connections."""
    async_names: str
    alone: str
    """What would be wrong with a statement that commits by itself; ``{how}``: how to begin a transaction."""


ENQUEUE: Final = Purpose(
    error=EnqueueError,
    sync="enqueue_tx",
    asynchronous="await producer.aenqueue_tx",
    sync_names="enqueue_tx, enqueue_many_tx",
    async_names="aenqueue_tx, aenqueue_many_tx",
    alone="so the tasks would not commit with anything: begin one ({how}), or use enqueue()",
)
COMPLETE: Final = Purpose(
    error=CompletionError,
    sync="complete_tx",
    asynchronous="await task.acomplete_tx",
    sync_names="complete_tx",
    async_names="acomplete_tx",
    alone="so the task would be completed whatever becomes of your statements: begin one ({how})",
)


class Session(Protocol):
    """A connection in a transaction of its user, sync."""

    raw: Any
    """The driver's own connection."""

    def query(self, text: str, params: Sequence[str]) -> Answer:
        """Run a statement whose parameters and answers are arrays as text."""

    def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None:
        """COPY rows into a leaf."""

    def execute(self, text: str) -> None:
        """Run a command without parameters."""

    def after_commit(self, wake: Wake) -> None:
        """Let ``wake`` be called after the commit, where the driver tells of it."""


class AsyncSession(Protocol):
    """A connection in a transaction of its user, async. As `Session`."""

    raw: Any

    async def query(self, text: str, params: Sequence[str]) -> Answer: ...
    async def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None: ...
    async def execute(self, text: str) -> None: ...
    def after_commit(self, wake: Wake) -> None: ...


@cache
def _queries() -> dict[str, str]:
    return _engine.queries()


@lru_cache(maxsize=512)
def text_of(name: str, schema: str) -> str:
    """The statement of that name for a schema."""
    return _engine.render(_queries()[name], schema)


def copy_text(schema: str, leaf: int) -> str:
    """The COPY into a leaf."""
    return text_of("copy_tasks", schema).replace("{leaf}", f"{leaf:02}")


def read_array(text: str | bytes) -> list[int]:
    """An array of numbers from its text, such as ``{1,2}``."""
    inner = text[1:-1]
    return (
        [int(part) for part in (inner.split(b",") if isinstance(inner, bytes) else inner.split(","))] if inner else []
    )


def no_transaction(how: str, purpose: Purpose) -> FastqError:
    """The error for a connection that commits each statement by itself."""
    return purpose.error(
        f"the connection is in autocommit mode and no transaction is open, {purpose.alone.format(how=how)}"
    )


def sqlstate_of(error: BaseException) -> str | None:
    """The server's code, where it is the server's error."""
    # Django's errors have the driver's as their cause.
    for each in (error, error.__cause__):
        code = getattr(each, "sqlstate", None)
        if isinstance(code, str):
            return code
    return None


__all__ = [
    "COMPLETE",
    "COPY_COLUMNS",
    "ENQUEUE",
    "Answer",
    "AsyncSession",
    "Purpose",
    "Session",
    "Wake",
    "copy_text",
    "no_transaction",
    "read_array",
    "sqlstate_of",
    "text_of",
]
