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

from fastq import _engine, _exit
from fastq._engine import EnqueuedIds, ProducerCore
from fastq._feed import Feed, Switch
from fastq._lifetime import has_running_loop, refuse_running_loop
from fastq._mailbox import Mailbox
from fastq._options import ProducerOptions, read_count, read_producer_options
from fastq._threads import watch_logs
from fastq.errors import EnqueueError
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
            PayloadError: a payload can't be encoded, or is over the limit (``index`` says which).
            SettingsError: ``commit_every`` is not a whole number from 1.
            SchemaError, ConnectionLost, DatabaseError: as ``enqueue``.
        """
        refuse_running_loop("Producer.enqueue_many()", "`await producer.aenqueue_many(tasks)`", EnqueueError)
        _check_iterable(tasks)
        every = None if commit_every is None else read_count("commit_every", commit_every)
        return EnqueuedMany(self._open_core().enqueue_many(tasks, every))

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


def _check_iterable(tasks: object) -> None:
    if isinstance(tasks, Task) or not isinstance(tasks, Iterable | AsyncIterable):
        raise TypeError(f"an iterable of fastq.Task is wanted, not {type(tasks).__name__}")


__all__ = ["EnqueuedMany", "Producer"]
