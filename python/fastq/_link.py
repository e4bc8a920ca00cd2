"""The client's way to the database: one connection, made at the first call and again when it was lost, for threads that take turns."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastq import migrations, rights
from fastq._actions import Query, Whom
from fastq._db import Database, Row, was_too_late
from fastq.errors import ConnectionLost, DatabaseError

T = TypeVar("T")

_log = logging.getLogger("fastq.client")


class Link:
    """Reads, and changes, in short transactions. Each call raises `SettingsError`, `SchemaError`, `ConnectionLost`, `DatabaseError`."""

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

    def read(self, query: str, *params: object, walk: bool) -> list[Row]:
        """One statement, on a new connection if the old one turns out to be lost.

        Args:
            query: its name.
            params: its parameters.
            walk: it finds all it needs by indexes, whatever the statistics say.
        """
        with self._lock:
            try:
                return self._read_once(query, params, walk=walk)
            except ConnectionLost as error:
                if was_too_late(error):
                    raise
                # It may have been idle for hours: the loss shows at its next use. Reading twice does no harm.
                return self._read_once(query, params, walk=walk)

    def _read_once(self, query: str, params: Sequence[object], *, walk: bool) -> list[Row]:
        db = self._connection()
        try:
            with db.transaction():
                db.query("set_plan", "off" if walk else "on")
                return db.query(query, *params)
        except ConnectionLost:
            self._drop()
            raise

    def _connection(self) -> Database:
        if self._pid != os.getpid():
            # After a fork the connection is the parent's: leave it alone (closing it would end the parent's session).
            self._db, self._pid = None, os.getpid()
        if self._db is None or self._db.is_closed:
            db = Database(self._dsn, self.schema, **self._options)
            try:
                migrations.check(db, kind="viewer")
            except BaseException:
                db.close()
                raise
            self._db, self._may_change = db, False
        return self._db

    def _drop(self) -> None:
        if self._db is not None and self._pid == os.getpid():
            self._db.close()
        self._db = None

    def within(self, work: Callable[[Query], T], *, repeatable: bool) -> T:
        """Does some work in one transaction, on a new connection if the old one turns out to be lost.

        Args:
            work: what to do.
            repeatable: also if it may have been committed then.
        """
        with self._lock:
            try:
                return self._within_once(work)
            except ConnectionLost as error:
                if was_too_late(error) or (error.in_doubt and not repeatable):
                    raise
                return self._within_once(work)

    def _within_once(self, work: Callable[[Query], T]) -> T:
        db = self._connection()
        try:
            if not self._may_change:
                rights.check(db, "worker")
                self._may_change = True
            whom = Whom(db.query)
            with db.transaction():
                db.query("set_plan", "off")
                result = work(whom)
        except ConnectionLost:
            self._drop()
            raise
        self._tell(db, whom)
        return result

    def _tell(self, db: Database, whom: Whom) -> None:
        """Have workers look at what was taken from them: after the commit, which a notification within would hold up for others."""
        try:
            for message in whom.messages():
                db.query("notify_ready", f"fastq:{self.schema}", message)
        except ConnectionLost:
            self._drop()
        except DatabaseError:
            # It is done and committed, and workers look by themselves, too.
            _log.debug("workers could not be told of what was cancelled", exc_info=True)


__all__ = ["Link"]
