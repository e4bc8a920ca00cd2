"""Answers to `Producer.aenqueue` on their way to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from fastq.errors import EnqueueError

if TYPE_CHECKING:
    from fastq._engine import ProducerCore
    from fastq.task import Task


class Mailbox:
    """One event loop's: made and used on its thread. A byte on a socket says that answers are there.

    Args:
        core: answers by number.
        loop: the running one.
    """

    __slots__ = ("_core", "_futures", "_number", "_reader", "_writer", "loop")

    def __init__(self, core: ProducerCore, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self.loop = loop
        self._futures: dict[int, asyncio.Future[tuple[int, bool]]] = {}
        self._reader, self._writer = socket.socketpair()
        try:
            self._reader.settimeout(0)
            self._writer.settimeout(0)
            self._number = core.attach_loop(self._writer.fileno())
        except BaseException:
            self._reader.close()
            self._writer.close()
            raise
        loop.add_reader(self._reader.fileno(), self._wake)

    def submit(self, task: Task) -> asyncio.Future[tuple[int, bool]]:
        """Enqueue ``task``; the future gets its id and whether it is new."""
        number = self._core.submit(self._number, task)
        # Answers are fetched on this thread, so none has been for this number.
        future = self._futures[number] = self.loop.create_future()
        return future

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self._reader.recv(4096)
        # Until there is nothing: only then the next byte is written.
        while answers := self._core.receive(self._number):
            for number, result, error in answers:
                future = self._futures.pop(number)
                # Done: its awaiter was cancelled.
                if future.done():
                    continue
                if result is not None:
                    future.set_result(result)
                else:
                    future.set_exception(error if error is not None else EnqueueError("no answer came"))

    def close(self) -> None:
        """Take it down, from any thread. The core has been closed, or the loop has. Awaiters that are left get an error."""
        try:
            self.loop.call_soon_threadsafe(self._take_down)
        except RuntimeError:  # the loop is closed: nobody awaits
            self._detach()

    def _take_down(self) -> None:
        self._wake()
        self.loop.remove_reader(self._reader.fileno())
        self._detach()
        for future in self._futures.values():
            if not future.done():
                future.set_exception(EnqueueError("the producer was closed"))
        self._futures.clear()

    def _detach(self) -> None:
        # In this order: the core writes to the socket's number.
        self._core.detach_loop(self._number)
        self._reader.close()
        self._writer.close()


__all__ = ["Mailbox"]
