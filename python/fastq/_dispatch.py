"""Async handlers on an event loop: the engine's mailbox in, outcomes out.

No awaitable crosses the border to the engine: a byte on a socket wakes the loop, which fetches the messages in batches, runs a
coroutine for each task, and tells the engine when it ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

from fastq._tx.completing import ahad_completed
from fastq.context import CURRENT
from fastq.errors import ConsumerError

if TYPE_CHECKING:
    from fastq._engine import Engine, TaskInfo

Handler = Callable[["TaskInfo"], Awaitable[object]]
OnError = Callable[["TaskInfo", BaseException], tuple[bool, float | None, str, str]]

#: Messages fetched before the loop's other callbacks get their turn.
_BATCH: Final = 256
_CANCEL: Final = 1
_INTERRUPT: Final = 2
# A task's first step runs at once, without a way through the loop's queue.
_EAGER: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}

_log = logging.getLogger("fastq.handler")


class _Run:
    """One task that runs on the loop."""

    __slots__ = ("coroutine", "info", "number")

    def __init__(self, number: int, info: TaskInfo) -> None:
        self.number = number
        self.info = info
        self.coroutine: asyncio.Task[None] | None = None


class Dispatcher:
    """Runs a consumer's async handlers on one event loop. Methods are called on that loop's thread unless they say else.

    Args:
        engine: its mailbox is fetched from, and it is told the outcomes.
        handlers: one for each of the engine's types, None where it is sync.
        on_error: gives the verdict on what a handler raised.
        reraise: a KeyboardInterrupt in a handler goes on to the loop (the caller's own) once it is noted.
    """

    def __init__(
        self, engine: Engine, handlers: list[Handler | None], on_error: OnError, *, reraise: bool = False
    ) -> None:
        self._engine = engine
        self._handlers = handlers
        self._on_error = on_error
        self._reraise = reraise
        # By run, not by task: one that was lost and came back may run here twice at once.
        self._running: dict[int, _Run] = {}
        self._cancelled: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(0)
        self._writer.settimeout(0)
        self._run = self._make_run()

    def listen(self) -> None:
        """Begin to listen, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reader.fileno(), self._wake)

    def connect(self) -> None:
        """Have the engine, which has been started, send its tasks here. From any thread."""
        self._engine.attach_loop(self._writer.fileno())
        # It has a duplicate of it.
        self._writer.close()

    def close(self) -> None:
        """Listen no more. What runs goes on."""
        self._loop.remove_reader(self._reader.fileno())
        self._reader.close()
        self._writer.close()

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel what runs and forget its outcomes. Returns what is still to end."""
        runs = list(self._running.values())
        self._running.clear()
        for run in runs:
            self._cancel(run)
        return [task for task in self._cancelled if not task.done()]

    def cancel_soon(self) -> None:
        """As ``cancel``, from any thread."""
        # Closed: nothing runs on it any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.cancel)

    def _cancel(self, run: _Run) -> None:
        task = run.coroutine
        if task is not None and task.cancel():
            # Until it ends, nobody else holds it.
            self._cancelled.add(task)
            task.add_done_callback(self._cancelled.discard)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self._reader.recv(4096)
        if not self._pumping:
            self._pump()

    def _pump(self) -> None:
        messages = self._engine.receive(_BATCH)
        for kind, number, info in messages:
            if kind == _CANCEL:
                # Timed out: its attempt has ended already, and what comes of it now is dropped.
                run = self._running.pop(number, None)
                if run is not None:
                    self._cancel(run)
            elif kind == _INTERRUPT:
                # Its task was cancelled. It keeps its place until it ends: what it returns all the same is refused by the database.
                run = self._running.get(number)
                if run is not None and run.coroutine is not None:
                    run.coroutine.cancel()
            else:
                self._start(number, info)
        # Again until there is nothing: only then does the engine write the next byte. By way of the loop, and behind the
        # first steps of what was just started: what ended in them has made room, and needs no byte.
        self._pumping = bool(messages)
        if messages:
            self._loop.call_soon(self._pump)

    def _start(self, number: int, info: TaskInfo) -> None:
        run = _Run(number, info)
        self._running[number] = run
        # A fresh context for each task: nothing that one sets is seen by another.
        context = Context()
        context.run(CURRENT.set, info)
        task = asyncio.Task(self._run(run, info), loop=self._loop, context=context, **_EAGER)
        run.coroutine = task

    def _make_run(self) -> Callable[[_Run, TaskInfo], Coroutine[Any, Any, None]]:
        running = self._running
        handlers = self._handlers
        begin = self._engine.begin
        complete = self._engine.complete
        fail = self._fail

        async def run_task(run: _Run, info: TaskInfo) -> None:
            # Asked by each, and as late as can be: those before it in its batch may have taken their time, or the process stood
            # still, and others have what it holds.
            kind = begin(info)
            if kind is None:
                running.pop(run.number, None)
                return
            try:
                value = await handlers[kind](info)  # type: ignore[misc]  # the engine sends no task of a sync handler
            except BaseException as error:
                fail(run, error, is_completed=await ahad_completed(info, error))
                if not isinstance(error, Exception | asyncio.CancelledError) and self._goes_on(error):
                    raise
            else:
                if running.get(run.number) is run:
                    del running[run.number]
                    complete(info, value)

        return run_task

    def _goes_on(self, error: BaseException) -> bool:
        return isinstance(error, GeneratorExit) or (self._reraise and isinstance(error, KeyboardInterrupt))

    def _fail(self, run: _Run, error: BaseException, *, is_completed: bool) -> None:
        info = run.info
        # GeneratorExit: the loop is gone and its coroutines are being cleared away.
        if self._running.get(run.number) is not run or isinstance(error, GeneratorExit):
            return
        del self._running[run.number]
        if is_completed:
            self._engine.complete(info, None)
        elif not self._engine.dismiss(info, error):
            self._engine.fail(info, self._on_error(info, error))


class LoopThread:
    """An event loop in a thread of its own, for consumers that are started from sync code.

    Args:
        dispatcher: listens on the loop from its start to its end.
        on_death: called on this thread with the exception that ended the loop before its stop.
    """

    def __init__(self, dispatcher: Dispatcher, on_death: Callable[[BaseException], None]) -> None:
        self._dispatcher = dispatcher
        self._on_death = on_death
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._work: concurrent.futures.Future[None] | None = None
        # A daemon: a coroutine that never ends must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._main, name="fastq-loop", daemon=True)

    def start(self) -> None:
        """Start the thread, and return once the dispatcher listens."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self, timeout: float) -> None:
        """Cancel all that is left on the loop and end the thread; give up after ``timeout`` seconds."""
        if self._loop is not None and self._stop is not None:
            # Closed: it has ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("the event loop did not end within %g s: a coroutine does not give way", timeout)

    def run(self, work: Coroutine[Any, Any, None], timeout: float | None) -> None:
        """Run a coroutine on the loop and wait for its end; cancelled after ``timeout`` seconds (None: never). One at a time.

        Raises:
            ConsumerError: it did not end in time, was cancelled, or the loop has ended.
        """
        refused = ConsumerError("async hooks can't run: the event loop has ended")
        if (loop := self._loop) is None:
            work.close()
            raise refused
        try:
            self._work = future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # it is closed
            work.close()
            raise refused from None
        # Closed in between, it never comes to the coroutine. Closed from here on, its thread cancels what it finds waiting.
        if loop.is_closed():
            future.cancel()
        try:
            future.result(timeout)
        except concurrent.futures.CancelledError:
            work.close()
            raise ConsumerError("async hooks were cancelled, as they are when their event loop ends") from None
        except TimeoutError:
            if future.cancel():
                raise ConsumerError(f"async hooks did not end within {timeout} s") from None
            raise
        finally:
            self._work = None

    @property
    def ident(self) -> int | None:
        """The thread's."""
        return self._thread.ident

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - SystemExit too, from a task that a handler made
            if self._ready.is_set():
                _log.exception("the event loop of the async handlers died")
                self._on_death(error)
            else:
                self._failure = error
        finally:
            self._ready.set()
            if (work := self._work) is not None:
                work.cancel()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._dispatcher.listen()
        self._ready.set()
        try:
            await self._stop.wait()
        finally:
            self._dispatcher.close()


__all__ = ["Dispatcher", "Handler", "LoopThread", "OnError"]
