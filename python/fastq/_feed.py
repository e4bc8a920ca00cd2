"""Tasks from an event loop to the thread that writes them: for `Producer.aenqueue_many`."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterable, Iterable, Iterator
from typing import Final

from fastq.errors import EnqueueError
from fastq.task import Task

#: Tasks handed over together.
_BATCH: Final = 256
#: Tasks that wait for the thread before the iterable has to.
_ROOM: Final = 2048


class Cancelled(EnqueueError):  # noqa: N818 - it says what happened
    """The call was cancelled: raised in the thread, so that its transaction is rolled back. Nobody sees it."""


class Switch:
    """Passes tasks through until it is switched off. Iterated in the writing thread."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = tasks
        self._is_off = False

    def switch_off(self) -> None:
        """Let the next step raise Cancelled. From any thread."""
        self._is_off = True

    def __iter__(self) -> Iterator[Task]:
        for task in self._tasks:
            if self._is_off:
                raise Cancelled("the call was cancelled")
            yield task
        if self._is_off:
            raise Cancelled("the call was cancelled")


class Feed:
    """An async iterable's tasks for a thread that iterates. Holds about two thousand of them.

    Args:
        tasks: iterated on the running loop, by `pump`.
        commit_every: with it a transaction ends each so many tasks.
        timeout: seconds without a task in an open transaction, after which the thread gives up.
    """

    def __init__(self, tasks: AsyncIterable[Task], commit_every: int | None, timeout: float) -> None:
        self._tasks = tasks
        self._commit_every = commit_every
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._batch: list[Task] = []
        self._waiting = 0
        self._queue: queue.SimpleQueue[list[Task] | BaseException | None] = queue.SimpleQueue()

    async def pump(self) -> None:
        """Iterate. What the iterable raises is raised in the thread. To be cancelled when the thread has ended."""
        try:
            async for task in self._tasks:
                if not self._batch:
                    # A slow iterable's task leaves at the loop's next turn, a fast one's with its neighbours.
                    self._loop.call_soon(self._flush)
                self._batch.append(task)
                if len(self._batch) >= _BATCH:
                    self._flush()
                    await self._has_room.wait()
        except asyncio.CancelledError:
            self._queue.put(Cancelled("the call was cancelled"))
            raise
        except BaseException as error:  # noqa: BLE001 - to be raised where the tasks are written
            self._flush()
            self._queue.put(error)
        else:
            self._flush()
            self._queue.put(None)

    def _flush(self) -> None:
        if self._batch:
            self._waiting += len(self._batch)
            if self._waiting > _ROOM:
                self._has_room.clear()
            self._queue.put(self._batch)
            self._batch = []

    def _taken(self, count: int) -> None:
        self._waiting -= count
        if self._waiting <= _ROOM:
            self._has_room.set()

    def __iter__(self) -> Iterator[Task]:
        count = 0
        while True:
            is_open = count % self._commit_every != 0 if self._commit_every else count > 0
            try:
                batch = self._queue.get(timeout=self._timeout if is_open else None)
            except queue.Empty:
                raise EnqueueError(f"the iterable gave nothing for {self._timeout:g} s") from None
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            yield from batch
            count += len(batch)
            self._loop.call_soon_threadsafe(self._taken, len(batch))


__all__ = ["Cancelled", "Feed", "Switch"]
