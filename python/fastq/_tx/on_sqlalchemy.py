"""SQLAlchemy 2: `Connection` and `Session` over psycopg; `AsyncConnection` and `AsyncSession` over psycopg and asyncpg.

The transaction is SQLAlchemy's: it begins it, as with any statement, and ends it. What is written goes through the driver's own
connection under it, so errors are the driver's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from fastq._tx.parts import AsyncSession, Purpose, Session, Wake

S = TypeVar("S", Session, AsyncSession)
#: Makes the driver's session of its connection; the text says how to begin a transaction.
Find = Callable[[Any, str], S]

_HOW = "`with engine.begin() as conn:`, without the isolation level AUTOCOMMIT"
# Anything: SQLAlchemy begins a transaction with a connection's first statement.
_FIRST = "SELECT 1"


class _Waker:
    """Wakes consumers when a session or a connection commits. One for each, for as long as it lives."""

    def __init__(self) -> None:
        self._pending: list[Wake] = []

    def add(self, wake: Wake) -> None:
        self._pending.append(wake)

    def take(self, *, is_committed: bool) -> None:
        pending, self._pending = self._pending, []
        for wake in pending:
            wake(is_committed=is_committed)

    def about_to_commit(self, connection: Any) -> None:  # noqa: ARG002 - the event's argument
        self.take(is_committed=False)

    def rolled_back(self, connection: Any) -> None:  # noqa: ARG002 - the event's argument
        self._pending.clear()

    # A session's events come for its savepoints, too.

    def session_committed(self, session: Any) -> None:
        if not session.in_nested_transaction():
            self.take(is_committed=True)

    def session_rolled_back(self, session: Any) -> None:
        if not session.in_nested_transaction():
            self._pending.clear()


_wakers: WeakKeyDictionary[Any, _Waker] = WeakKeyDictionary()


def _waker_of(target: Any, *, is_session: bool) -> _Waker:
    waker = _wakers.get(target)
    if waker is None:
        waker = _wakers[target] = _Waker()
        # Loaded: the target is of that package.
        listen = sys.modules["sqlalchemy"].event.listen
        if is_session:
            listen(target, "after_commit", waker.session_committed)
            listen(target, "after_rollback", waker.session_rolled_back)
        else:
            listen(target, "commit", waker.about_to_commit)
            listen(target, "rollback", waker.rolled_back)
    return waker


class _Hook:
    """Where a commit is heard of: at the session, which tells of it afterwards, or at the connection, which tells before."""

    def __init__(self, target: Any, *, is_session: bool) -> None:
        self._target = target
        self._is_session = is_session

    def after_commit(self, wake: Wake) -> None:
        _waker_of(self._target, is_session=self._is_session).add(wake)


def _check(connection: Any, purpose: Purpose) -> None:
    if connection.dialect.name != "postgresql":
        raise purpose.error(f"the connection is to a database of the kind {connection.dialect.name}, not to PostgreSQL")


def find_session(target: Any, find: Find[Session], purpose: Purpose, *, is_session: bool) -> Session:
    """The driver's session under a `Connection` or `Session`."""
    connection = target.connection() if is_session else target
    _check(connection, purpose)
    if connection.dialect.is_async:
        raise TypeError(
            f"under this {type(target).__name__} lies the async driver {connection.dialect.driver}: "
            f"use `{purpose.asynchronous}` with the AsyncConnection or AsyncSession itself"
        )
    if not connection.in_transaction():
        connection.exec_driver_sql(_FIRST)
    session = find(connection.connection.driver_connection, _HOW)
    session.after_commit = _Hook(target, is_session=is_session).after_commit  # type: ignore[method-assign]
    return session


async def find_async_session(
    target: Any, find: Find[AsyncSession], purpose: Purpose, *, is_session: bool
) -> AsyncSession:
    """The driver's session under an `AsyncConnection` or `AsyncSession`."""
    connection = await target.connection() if is_session else target
    _check(connection, purpose)
    raw = (await connection.get_raw_connection()).driver_connection
    # asyncpg's adapter begins with the first statement, not with SQLAlchemy's transaction.
    if not connection.in_transaction() or not _is_begun(raw):
        await connection.exec_driver_sql(_FIRST)
    session = find(raw, _HOW.replace("with", "async with", 1))
    hook = _Hook(target.sync_session if is_session else connection.sync_connection, is_session=is_session)
    session.after_commit = hook.after_commit  # type: ignore[method-assign]
    return session


def _is_begun(raw: Any) -> bool:
    # psycopg begins by itself.
    return bool(raw.is_in_transaction()) if hasattr(raw, "is_in_transaction") else True


__all__ = ["find_async_session", "find_session"]
