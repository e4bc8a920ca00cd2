"""The client's way to the database: one connection, made at the first call and again when it was lost.

For threads, or coroutines, that take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

from fastq import migrations, rights
from fastq._actions import Whom
from fastq._db import AsyncBorrowed, AsyncDatabase, Borrowed, Database, was_too_late
from fastq._work import Plan, Row, Statement, Turn, Work, aconduct, aperform, conduct, perform
from fastq.errors import ConnectionLost, DatabaseError, SettingsError

T = TypeVar("T")

_log = logging.getLogger("fastq.client")


class Link:
    """Goes through plans. Each call raises `SettingsError`, `SchemaError`, `ConnectionLost`, `DatabaseError`."""

    __slots__ = ("_db", "_dsn", "_lock", "_may_change", "_options", "_pid", "schema")

    def __init__(self, dsn: str, schema: str, options: Mapping[str, Any]) -> None:
        self.schema = schema
        self._dsn = dsn
        self._options = options
        self._lock = threading.Lock()
        self._db: Database | None = None
        self._may_change = False
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the connection; a later call makes a new one."""
        with self._lock:
            self._drop()

    def run(self, plan: Plan[T]) -> T:
        """Go through a plan, each transaction on a new connection if the old one turns out to be lost."""
        return conduct(plan, self._take_turn)

    def _take_turn(self, turn: Turn[Any]) -> Any:
        with self._lock:
            try:
                return self._take_once(turn)
            except ConnectionLost as error:
                if not _may_repeat(turn, error):
                    raise
                return self._take_once(turn)

    def _take_once(self, turn: Turn[T]) -> T:
        db = self._connection()
        try:
            if turn.changes and not self._may_change:
                db.perform(rights.checking(self.schema, "worker"))
                self._may_change = True
            with db.transaction():
                result, whom = _sync(db, turn)
        except ConnectionLost:
            self._drop()
            raise
        # After the commit, which a notification within would hold up for others.
        try:
            for message in whom.messages():
                db.query("notify_ready", f"fastq:{self.schema}", message)
        except DatabaseError as error:
            _note_not_told(error)
            if isinstance(error, ConnectionLost):
                self._drop()
        return result

    def _connection(self) -> Database:
        if self._pid != os.getpid():
            # After a fork the connection is the parent's: leave it alone (closing it would end the parent's session).
            self._db, self._pid = None, os.getpid()
        if self._db is None or self._db.is_closed:
            db = Database(self._dsn, self.schema, **self._options)
            try:
                db.perform(migrations.checking(self.schema, kind="viewer"))
            except BaseException:
                db.close()
                raise
            self._db, self._may_change = db, False
        return self._db

    def _drop(self) -> None:
        if self._db is not None and self._pid == os.getpid():
            self._db.close()
        self._db = None


class AsyncLink:
    """As `Link`, on one event loop; on another one after that was closed."""

    __slots__ = ("_db", "_dsn", "_lock", "_loop", "_may_change", "_options", "_pid", "schema")

    def __init__(self, dsn: str, schema: str, options: Mapping[str, Any]) -> None:
        self.schema = schema
        self._dsn = dsn
        self._options = options
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._db: AsyncDatabase | None = None
        self._may_change = False
        self._pid = os.getpid()

    async def close(self) -> None:
        """Close the connection; a later call makes a new one."""
        self._enter_loop()
        async with self._lock:
            self._drop()

    async def run(self, plan: Plan[T]) -> T:
        """Go through a plan, each transaction on a new connection if the old one turns out to be lost."""
        return await aconduct(plan, self._take_turn)

    async def _take_turn(self, turn: Turn[Any]) -> Any:
        self._enter_loop()
        async with self._lock:
            try:
                return await self._take_once(turn)
            except ConnectionLost as error:
                if not _may_repeat(turn, error):
                    raise
                return await self._take_once(turn)

    async def _take_once(self, turn: Turn[T]) -> T:
        db = await self._connection()
        try:
            if turn.changes and not self._may_change:
                await db.perform(rights.checking(self.schema, "worker"))
                self._may_change = True
            async with db.transaction():
                result, whom = await _async(db, turn)
            try:
                for message in whom.messages():
                    await db.query("notify_ready", f"fastq:{self.schema}", message)
            except DatabaseError as error:
                _note_not_told(error)
                if isinstance(error, ConnectionLost):
                    self._drop()
        except (ConnectionLost, asyncio.CancelledError):
            # Cancelled in the middle of whatever it was: what the connection is in then is not worth finding out.
            self._drop()
            raise
        return result

    async def _connection(self) -> AsyncDatabase:
        if self._db is None or self._db.is_closed:
            db = await AsyncDatabase.connect(self._dsn, self.schema, **self._options)
            try:
                await db.perform(migrations.checking(self.schema, kind="viewer"))
            except BaseException:
                db.drop()
                raise
            self._db, self._may_change = db, False
        return self._db

    def _enter_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop and self._pid == os.getpid():
            return
        if self._loop is not None and self._pid == os.getpid():
            if not self._loop.is_closed():
                raise SettingsError("the client is in use on another event loop: make one for each")
            self._drop()
        # (After a fork the connection is the parent's: left alone.)
        self._db, self._pid, self._loop, self._lock = None, os.getpid(), loop, asyncio.Lock()

    def _drop(self) -> None:
        if self._db is not None:
            self._db.drop()
        self._db = None


def _may_repeat(turn: Turn[Any], error: ConnectionLost) -> bool:
    return not was_too_late(error) and (turn.repeatable or not error.in_doubt)


def _note_not_told(error: DatabaseError) -> None:
    # What was done is committed, and workers look by themselves, too.
    _log.debug("workers could not be told of what was cancelled: %s", error)


def _sync(db: Database, turn: Turn[T]) -> tuple[T, Whom]:
    whom = Whom()

    def query(name: str, *params: object) -> list[Row]:
        rows = db.query(name, *params)
        whom.note(name, rows)
        return rows

    return perform(_planned(turn), query), whom


async def _async(db: AsyncDatabase, turn: Turn[T]) -> tuple[T, Whom]:
    whom = Whom()

    async def query(name: str, *params: object) -> list[Row]:
        rows = await db.query(name, *params)
        whom.note(name, rows)
        return rows

    return await aperform(_planned(turn), query), whom


def _planned(turn: Turn[T]) -> Work[T]:
    yield Statement("set_plan", "off" if turn.walk else "on")
    return (yield from turn.work())


def _planned_as_guest(turn: Turn[T]) -> Work[T]:
    """In a transaction that goes on: its own statements shall be planned as they were."""
    [(jit, scan, *_)] = yield Statement("set_plan", "off" if turn.walk else "on")
    try:
        answer = yield from turn.work()
    except Exception:
        # Where the server refused a statement it takes no other, and the rollback, to a savepoint too, puts all back.
        with contextlib.suppress(DatabaseError):
            yield Statement("reset_plan", jit, scan)
        raise
    yield Statement("reset_plan", jit, scan)
    return answer


def borrowed(plan: Plan[T], db: Borrowed) -> T:
    """Go through a plan in the user's open transaction."""
    db.perform(migrations.checking(db.schema))
    return conduct(plan, lambda turn: db.perform(_planned_as_guest(turn)))


async def aborrowed(plan: Plan[T], db: AsyncBorrowed) -> T:
    """As `borrowed`."""
    await db.perform(migrations.checking(db.schema))
    return await aconduct(plan, lambda turn: db.perform(_planned_as_guest(turn)))


__all__ = ["AsyncLink", "Link", "aborrowed", "borrowed"]
