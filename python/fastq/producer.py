"""The producer: enqueues tasks, one or millions."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import threading
import weakref
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack, overload

from fastq import _engine, _exit, _tx
from fastq._engine import EnqueuedIds, ProducerCore, TxTasks
from fastq._feed import Feed, Switch
from fastq._lifetime import has_running_loop, refuse_running_loop
from fastq._mailbox import Mailbox
from fastq._options import ProducerOptions, read_count, read_producer_options
from fastq._threads import watch_logs
from fastq.errors import EnqueueError, SettingsError
from fastq.settings import ProducerSettings, resolve_dsn, resolve_schema
from fastq.task import Enqueued, Task


class EnqueuedMany(Sequence[Enqueued]):
    """What `Producer.enqueue_many` answers: an `Enqueued` for each task, in input order, in at most 16 bytes a task."""

    __slots__ = ("_ids", "_range")

    def __init__(self, ids: EnqueuedIds, indexes: range | None = None) -> None:
        self._ids = ids
        self._range = range(len(ids)) if indexes is None else indexes

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Enqueued: ...
    @overload
    def __getitem__(self, index: slice) -> EnqueuedMany: ...
    def __getitem__(self, index: int | slice) -> Enqueued | EnqueuedMany:
        if isinstance(index, slice):
            return EnqueuedMany(self._ids, self._range[index])
        try:
            position = self._range[operator.index(index)]
        except IndexError:
            raise IndexError(f"index {index} of {len(self)} results") from None
        return Enqueued(*self._ids.get(position))

    def __iter__(self) -> Iterator[Enqueued]:
        get = self._ids.get
        for index in self._range:
            yield Enqueued(*get(index))

    def __repr__(self) -> str:
        return f"<{len(self)} results of enqueue_many>"


class Producer:
    """Enqueues tasks: each is durable in the database when the call returns. For any number of threads and event loops.

    It connects at its first call, and again whenever it has to. Close it, or use it in a ``with`` or ``async with``.

    Args:
        dsn: a connection string, URI or keywords; None: FASTQ_DSN.
        schema: the schema that holds fastq's tables; None: FASTQ_SCHEMA, else ``"fastq"``.
        **settings: see `ProducerOptions`.

    Raises:
        SettingsError: no dsn, or a setting that is unknown or out of range.
    """

    def __init__(
        self, dsn: str | None = None, *, schema: str | None = None, **settings: Unpack[ProducerOptions]
    ) -> None:
        self._settings = ProducerSettings(
            dsn=resolve_dsn(dsn), schema=resolve_schema(schema), **read_producer_options(settings)
        )
        _engine.render("", self._settings.schema)
        self._core = ProducerCore(self._settings)
        self._lock = threading.Lock()
        self._mailbox: Mailbox | None = None
        self._mailboxes: list[Mailbox] = []
        self._is_closed = False
        # The users' connections that were found to be in this producer's database.
        self._known: weakref.WeakSet[object] = weakref.WeakSet()
        watch_logs(self._core)
        # Also when it is forgotten. When the interpreter ends, its turn comes after the consumers'.
        self._finalizer = weakref.finalize(self, _close, self._core, self._mailboxes, os.getpid())
        self._finalizer.atexit = False
        _exit.close_at_exit(self, _exit.PRODUCER)

    # --- sync ----------------------------------------------------------------------------------

    def enqueue(self, task: Task) -> Enqueued:
        """Enqueue one task; concurrent calls share a statement.

        Returns:
            Its id and True; or, where its idempotency token is held, the id of the task that holds it and False.

        Raises:
            EnqueueError: the task can't be enqueued as it is, the producer is closed, or an event loop runs in this thread
                (use ``aenqueue``).
            DuplicateTask: its token is held, and its ``on_conflict`` is ``"raise"``.
            PayloadError: its payload can't be encoded, or is over the limit.
            SchemaError: the schema is not migrated, or shut to this version.
            ConnectionLost: ``in_doubt`` says whether the task may be there.
            DatabaseError: the database refused it.
        """
        if has_running_loop():
            refuse_running_loop("Producer.enqueue()", "`await producer.aenqueue(task)`", EnqueueError)
        _check_task(task)
        return Enqueued(*self._open_core().enqueue(task))

    def enqueue_many(self, tasks: Iterable[Task], *, commit_every: int | None = None) -> Sequence[Enqueued]:
        """Enqueue tasks from any iterable, streamed in bounded memory.

        Args:
            tasks: iterated in this thread, while the transaction is open.
            commit_every: None: all in one transaction, all or nothing. Else one transaction each so many tasks, for long
                streams: what is committed stays when a later one fails, and the error says how many.

        Returns:
            The results, in input order.

        Raises:
            EnqueueError: a task can't be enqueued as it is (``index`` says which), the iterable raised (its cause) or gave
                nothing for too long, the producer is closed, or an event loop runs in this thread. ``committed`` says how
                many tasks are in, with ``commit_every``.
            DuplicateTask: the token of a task is held, by an earlier one of the call or another, and its ``on_conflict`` is
                ``"raise"`` (``index`` says which).
            PayloadError: a payload can't be encoded, or is over the limit (``index`` says which).
            SettingsError: ``commit_every`` is not a whole number from 1.
            SchemaError, ConnectionLost, DatabaseError: as ``enqueue``.
        """
        refuse_running_loop("Producer.enqueue_many()", "`await producer.aenqueue_many(tasks)`", EnqueueError)
        _check_iterable(tasks)
        every = None if commit_every is None else read_count("commit_every", commit_every)
        return EnqueuedMany(self._open_core().enqueue_many(tasks, every))

    def enqueue_tx(self, conn: object, task: Task, *, notify: bool = False) -> Enqueued:
        """Enqueue one task in your own transaction: rolled back, nobody ever sees it; committed, it runs.

        Nothing but the statement goes over your connection; the task's id comes from the producer's own. A consumer that does
        not hear of your commit claims the task within its poll interval.

        Args:
            conn: a psycopg 3 ``Connection``, a SQLAlchemy 2 ``Connection`` or ``Session`` over psycopg 3, or a Django connection
                over psycopg 3; to the producer's database, and in a transaction, or about to begin one with its next statement.
            task: what to enqueue. Its delay counts from now, by the database's clock.
            notify: wake consumers with the commit itself. The NOTIFY takes a lock on the whole server while your transaction
                commits. With SQLAlchemy and Django they are woken after the commit anyhow.

        Returns:
            Its id and True; or, where its idempotency token is held, the id of the task that holds it and False. A token that
            another open transaction is about to take is waited for, until that one ends.

        Raises:
            EnqueueError: the task can't be enqueued as it is, the connection commits each statement by itself (autocommit) or
                is to another database, the producer is closed, or an event loop runs in this thread (use ``aenqueue_tx``).
            DuplicateTask: as ``enqueue``; your transaction goes on.
            PayloadError: its payload can't be encoded, or is over the limit.
            TypeError: no task, or a connection that is not taken: the message says which are.
            SchemaError, ConnectionLost, DatabaseError: what happened to the producer's own connection.
            Exception: what your driver raises (Django's own errors on Django's connections), such as for a deadlock (40P01), a
                serialization failure (40001) or a token that was waited for too long (55P03, 57014): nothing is repeated in
                your transaction. A note in the error says what it means.
        """
        refuse_running_loop("Producer.enqueue_tx()", "`await producer.aenqueue_tx(conn, task)`", EnqueueError)
        _check_task(task)
        tasks = TxTasks.one(self._open_core(), task)
        self._write(conn, tasks, notify)
        return Enqueued(*tasks.answer().get(0))

    def enqueue_many_tx(self, conn: object, tasks: Iterable[Task], *, notify: bool = False) -> Sequence[Enqueued]:
        """Enqueue tasks in your own transaction, many by COPY.

        All are read and checked, and held in memory in their encoded form, before the first is sent: a call takes 1 GiB of
        them. Interrupted, it leaves nothing of it in your transaction.

        Args:
            conn: as for ``enqueue_tx``.
            tasks: any iterable.
            notify: as for ``enqueue_tx``.

        Returns:
            The results, in input order.

        Raises:
            EnqueueError: as ``enqueue_tx``; ``index`` says which task can't be enqueued.
            DuplicateTask: as ``enqueue_many``; nothing of the call is written, and your transaction goes on.
            PayloadError: a payload can't be encoded, or is over the limit (``index`` says which).
            TypeError, SchemaError, ConnectionLost, DatabaseError, Exception: as ``enqueue_tx``, and what ``tasks`` raises.
        """
        refuse_running_loop(
            "Producer.enqueue_many_tx()", "`await producer.aenqueue_many_tx(conn, tasks)`", EnqueueError
        )
        _check_iterable(tasks, is_async=False)
        read = TxTasks(self._open_core(), tasks)
        self._write(conn, read, notify)
        return EnqueuedMany(read.answer())

    def close(self) -> None:
        """Finish what is under way and close the connections. A second call does nothing."""
        self._is_closed = True
        _exit.forget(self)
        self._finalizer()

    close_at_exit = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- async ---------------------------------------------------------------------------------

    async def aenqueue(self, task: Task) -> Enqueued:
        """As ``enqueue``, without making the event loop wait. Cancelled, the task may be enqueued all the same.

        Raises:
            EnqueueError, PayloadError, SchemaError, ConnectionLost, DatabaseError: as ``enqueue``.
        """
        _check_task(task)
        return Enqueued(*await self._mailbox_of(asyncio.get_running_loop()).submit(task))

    async def aenqueue_many(
        self, tasks: Iterable[Task] | AsyncIterable[Task], *, commit_every: int | None = None
    ) -> Sequence[Enqueued]:
        """As ``enqueue_many``, without making the event loop wait; the writing is done in a thread.

        Cancelled, its open transaction is rolled back, soon after.

        Args:
            tasks: iterated in the thread; an async iterable on this loop.
            commit_every: as for ``enqueue_many``.

        Raises:
            EnqueueError, PayloadError, SettingsError, SchemaError, ConnectionLost, DatabaseError: as ``enqueue_many``.
        """
        _check_iterable(tasks)
        every = None if commit_every is None else read_count("commit_every", commit_every)
        core = self._open_core()
        if not isinstance(tasks, AsyncIterable):
            switch = Switch(tasks)
            try:
                return EnqueuedMany(await asyncio.to_thread(core.enqueue_many, switch, every))
            except asyncio.CancelledError:
                switch.switch_off()
                raise
        feed = Feed(tasks, every, self._settings.iterable_timeout)
        pump = asyncio.create_task(feed.pump())
        try:
            return EnqueuedMany(await asyncio.to_thread(core.enqueue_many, feed, every))
        finally:
            pump.cancel()
            await asyncio.wait([pump])

    async def aenqueue_tx(self, conn: object, task: Task, *, notify: bool = False) -> Enqueued:
        """As ``enqueue_tx``, on an async connection. Cancelled while the statement is under way, your driver decides.

        Args:
            conn: a psycopg 3 ``AsyncConnection``, an asyncpg ``Connection`` (or what its pool gives), or a SQLAlchemy 2
                ``AsyncConnection`` or ``AsyncSession`` over one of them.
            task: as for ``enqueue_tx``.
            notify: as for ``enqueue_tx``.

        Raises:
            EnqueueError, PayloadError, TypeError, SchemaError, ConnectionLost, DatabaseError, Exception: as ``enqueue_tx``.
        """
        _check_task(task)
        tasks = TxTasks.one(self._open_core(), task)
        await self._awrite(conn, tasks, notify)
        return Enqueued(*tasks.answer().get(0))

    async def aenqueue_many_tx(
        self, conn: object, tasks: Iterable[Task] | AsyncIterable[Task], *, notify: bool = False
    ) -> Sequence[Enqueued]:
        """As ``enqueue_many_tx``, on an async connection as ``aenqueue_tx`` takes it.

        Args:
            conn: as for ``aenqueue_tx``.
            tasks: iterated in a thread; an async iterable on this loop.
            notify: as for ``enqueue_tx``.

        Raises:
            EnqueueError, PayloadError, TypeError, SchemaError, ConnectionLost, DatabaseError, Exception: as ``enqueue_many_tx``.
        """
        _check_iterable(tasks)
        core = self._open_core()
        if isinstance(tasks, AsyncIterable):
            tasks = [task async for task in tasks]
        switch = Switch(tasks)
        try:
            read = await asyncio.to_thread(TxTasks, core, switch)
        except asyncio.CancelledError:
            switch.switch_off()
            raise
        await self._awrite(conn, read, notify)
        return EnqueuedMany(read.answer())

    async def aclose(self) -> None:
        """As ``close``, without making the event loop wait."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    # --- both ----------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, float]:
        """Counters since it was made: enqueued, flights, statements, commits and more."""
        return self._core.stats()

    def _write(self, conn: object, tasks: TxTasks, notify: object) -> None:
        call = self._new_write(tasks, notify)
        session = _tx.find_session(conn)
        if len(tasks):
            _tx.run(session, call)
            call.announce(session, self._core)

    async def _awrite(self, conn: object, tasks: TxTasks, notify: object) -> None:
        call = self._new_write(tasks, notify)
        session = await _tx.find_async_session(conn)
        if len(tasks):
            await _tx.arun(session, call)
            call.announce(session, self._core)

    def _new_write(self, tasks: TxTasks, notify: object) -> _tx.Write:
        if not isinstance(notify, bool):
            raise SettingsError(f"notify is {notify!r}, but must be True or False")
        return _tx.Write(tasks, self._settings.schema, self._known, notify=notify)

    def _open_core(self) -> ProducerCore:
        if self._is_closed:
            raise EnqueueError("the producer is closed: make another")
        return self._core

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        core = self._open_core()
        # Nearly always there is one loop.
        mailbox = self._mailbox
        if mailbox is not None and mailbox.loop is loop:
            return mailbox
        with self._lock:
            for old in [each for each in self._mailboxes if each.loop.is_closed()]:
                self._mailboxes.remove(old)
                old.close()
            for mailbox in self._mailboxes:
                if mailbox.loop is loop:
                    break
            else:
                mailbox = Mailbox(core, loop)
                self._mailboxes.append(mailbox)
            self._mailbox = mailbox
            return mailbox


def _close(core: ProducerCore, mailboxes: list[Mailbox], pid: int) -> None:
    if pid != os.getpid():
        # In a forked child none of its threads is there, and the connections are the parent's.
        return
    core.close()
    for mailbox in mailboxes:
        with contextlib.suppress(Exception):
            mailbox.close()
    mailboxes.clear()


def _check_task(task: object) -> None:
    if not isinstance(task, Task):
        raise TypeError(f"a fastq.Task is wanted, not {type(task).__name__}: {task!r:.100}")


def _check_iterable(tasks: object, *, is_async: bool = True) -> None:
    if isinstance(tasks, Task) or not isinstance(tasks, Iterable | AsyncIterable if is_async else Iterable):
        raise TypeError(f"an iterable of fastq.Task is wanted, not {type(tasks).__name__}")


__all__ = ["EnqueuedMany", "Producer"]
