"""psycopg 3: `Connection` and `AsyncConnection`.

Statements run on cursors of psycopg's own classes, whatever the connection's cursor and row factories are; parameters are of a class
of our own, which no adapter of the user's concerns; answers are taken as the server sent them. Preparing is left to the connection's
settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

from fastq._tx.parts import ENQUEUE, Answer, Purpose, Wake, copy_text, no_transaction, read_array

# libpq's states of a transaction and of a pipeline.
_IDLE: Final = 0
_PIPELINE_OFF: Final = 0


class _Literal:
    """A parameter: plain ASCII, whose type the statement says."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _LiteralDumper:
    """Passes a `_Literal` on. The protocol is that of `psycopg.abc.Dumper`."""

    format = 0
    oid = 0

    def __init__(self, cls: type, context: object = None) -> None:  # noqa: ARG002 - the protocol's argument
        self._class = cls

    def dump(self, obj: _Literal) -> bytes:
        return obj.text.encode("ascii")

    def quote(self, obj: _Literal) -> bytes:
        return b"'" + self.dump(obj) + b"'"

    def get_key(self, obj: object, format: object) -> type:  # noqa: A002, ARG002 - the protocol's names
        return self._class

    def upgrade(self, obj: object, format: object) -> _LiteralDumper:  # noqa: A002, ARG002 - the protocol's names
        return self


def _to_tuples(cursor: object) -> type[tuple[Any, ...]]:  # noqa: ARG001 - the protocol of a row factory
    return tuple


def _new_cursor(connection: Any, kind: Literal["RawCursor", "AsyncRawCursor"]) -> Any:
    # Loaded: the connection is of that package.
    cursor = getattr(sys.modules["psycopg"], kind)(connection, row_factory=_to_tuples)
    # The cursor's own, not the connection's.
    cursor.adapters.register_dumper(_Literal, _LiteralDumper)
    return cursor


def _check(connection: Any, how: str, purpose: Purpose) -> None:
    if connection.closed:
        return  # the driver says it better
    if connection.pgconn.pipeline_status != _PIPELINE_OFF:
        raise purpose.error(
            f"the connection is in pipeline mode, in which nothing can be read back: {purpose.sync} outside of it"
        )
    if connection.autocommit and connection.info.transaction_status == _IDLE:
        raise no_transaction(how, purpose)


def _read(cursor: Any) -> Answer:
    result = cursor.pgresult
    return [read_array(result.get_value(0, n) or b"{}") for n in range(result.nfields)]


class PsycopgSession:
    """A `psycopg.Connection`."""

    def __init__(self, connection: Any, how: str = "`with conn.transaction():`", purpose: Purpose = ENQUEUE) -> None:
        self.raw = connection
        _check(connection, how, purpose)

    def query(self, text: str, params: Sequence[str]) -> Answer:
        with _new_cursor(self.raw, "RawCursor") as cursor:
            cursor.execute(text, [_Literal(param) for param in params] or None)
            return _read(cursor)

    def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None:
        with _new_cursor(self.raw, "RawCursor") as cursor, cursor.copy(copy_text(schema, leaf)) as copy:
            for block in blocks:
                copy.write(block)

    def execute(self, text: str) -> None:
        with _new_cursor(self.raw, "RawCursor") as cursor:
            cursor.execute(text)

    def after_commit(self, wake: Wake) -> None:
        """Psycopg tells nobody of a commit."""


class AsyncPsycopgSession:
    """A `psycopg.AsyncConnection`."""

    def __init__(
        self, connection: Any, how: str = "`async with conn.transaction():`", purpose: Purpose = ENQUEUE
    ) -> None:
        self.raw = connection
        _check(connection, how, purpose)

    async def query(self, text: str, params: Sequence[str]) -> Answer:
        async with _new_cursor(self.raw, "AsyncRawCursor") as cursor:
            await cursor.execute(text, [_Literal(param) for param in params] or None)
            return _read(cursor)

    async def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None:
        async with (
            _new_cursor(self.raw, "AsyncRawCursor") as cursor,
            cursor.copy(copy_text(schema, leaf)) as copy,
        ):
            for block in blocks:
                await copy.write(block)

    async def execute(self, text: str) -> None:
        async with _new_cursor(self.raw, "AsyncRawCursor") as cursor:
            await cursor.execute(text)

    def after_commit(self, wake: Wake) -> None:
        """Psycopg tells nobody of a commit."""


__all__ = ["AsyncPsycopgSession", "PsycopgSession"]
