"""A consumer that runs: its engine, its threads and its loop, from the start to the end of the last of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastq import _exit
from fastq._dispatch import Dispatcher, Handler, LoopThread
from fastq._engine import Engine, TaskInfo
from fastq._lifetime import Bell, News, Steps, drive
from fastq._threads import Housekeeper, emit_rest
from fastq.errors import ConsumerError
from fastq.lifespan import Lifespan, run_without_loop
from fastq.outcome import FailureHandler
from fastq.settings import ConsumerSettings

SyncHandler = Callable[[TaskInfo], object]

#: Seconds in which an engine that was given up stores what it has and signs off: a database that answers needs milliseconds.
_LAST: Final = 1.0
#: Seconds for an engine to end that should have by itself.
_GRACE: Final = 5.0
#: Seconds for threads to end that have nothing more to do.
_JOIN: Final = 1.0
#: Seconds that async shutdown hooks may take together.
_HOOKS: Final = 60.0
#: Seconds for another thread to take it down.
_TURN: Final = _HOOKS + 2 * _GRACE
#: Seconds for which there must be too many stuck handlers before that ends the consumer.
_STUCK: Final = 5.0
#: Seconds for handlers when the interpreter ends without a stop.
_EXIT_TIMEOUT: Final = 2.0

_log = logging.getLogger("fastq.consumer")


class Running:
    """Owns all that a started consumer consists of.

    Args:
        settings: for the engine.
        sync_handlers: one for each of settings.types, None where it is async.
        async_handlers: one for each of settings.types, None where it is sync.
        on_error: gives the verdict on what a handler raised.
        lifespan: opened before the first task, closed after the last handler.
        stop_timeout: seconds for running handlers when it ends by itself.
        own_loop: async handlers run on a loop in a thread of its own, else on the caller's.
    """

    def __init__(
        self,
        settings: ConsumerSettings,
        sync_handlers: list[SyncHandler | None],
        async_handlers: list[Handler | None],
        on_error: FailureHandler,
        *,
        lifespan: Lifespan,
        stop_timeout: float,
        own_loop: bool,
    ) -> None:
        self.engine = Engine(settings, sync_handlers, on_error)
        self.pid = os.getpid()
        self.own_loop = own_loop
        self._lifespan = lifespan
        self.bell = Bell()
        self._starting = threading.Lock()
        # Reentrant: a shutdown hook may call a stop.
        self._finishing = threading.RLock()
        self._is_finished = False
        self._end_error: ConsumerError | None = None
        self._is_up = False
        self._is_stopping = False
        self._gave_up = False
        self._died = False
        self._failure: BaseException | None = None
        self._stuck_since: float | None = None
        self._stuck_limit, self._stop_timeout = settings.stuck_limit, stop_timeout
        self._housekeeper = Housekeeper(self.engine, self._look, self._on_end)
        self._dispatcher: Dispatcher | None = None
        self._loop_thread: LoopThread | None = None
        if lifespan.needs_loop or any(handler is not None for handler in async_handlers):
            self._dispatcher = Dispatcher(self.engine, async_handlers, on_error, reraise=not own_loop)
            if own_loop:
                self._loop_thread = LoopThread(self._dispatcher, self._on_loop_death)

    # --- start ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start all of it, waiting for the database on this thread."""
        try:
            if self._loop_thread is not None:
                self._loop_thread.start()
            self._run_on_loop(self._lifespan.open(), None)
            self.engine.start()
            if self._dispatcher is not None:
                self._dispatcher.connect()
            self._begun()
        except BaseException:
            self._undo_begin()
            raise

    async def begin_async(self) -> None:
        """Start all of it, with async handlers on the running loop."""
        if self._dispatcher is not None:
            self._dispatcher.listen()
        try:
            await self._lifespan.open()
            await asyncio.to_thread(self._start_engine)
            if self._dispatcher is not None:
                self._dispatcher.connect()
            self._begun()
        except asyncio.CancelledError:
            # The thread can't be stopped: what it brings up is put down again, by who comes second.
            with self._starting:
                self._is_stopping = True
                if self._is_up:
                    self._put_down()
            if self._dispatcher is not None:
                self._dispatcher.close()
            with contextlib.suppress(ConsumerError):
                await self._lifespan.close()
            raise
        except BaseException:
            self._undo_begin()
            with contextlib.suppress(ConsumerError):
                await self._lifespan.close()
            raise

    def _start_engine(self) -> None:
        self.engine.start()
        with self._starting:
            self._is_up = True
            if self._is_stopping:
                self._put_down()

    def _begun(self) -> None:
        self._housekeeper.start()
        _exit.close_at_exit(self, _exit.CONSUMER)

    def _undo_begin(self) -> None:
        # It may have started: a Ctrl-C is raised after that.
        with contextlib.suppress(Exception):
            self.engine.abandon()
            self.engine.join(_GRACE)
        emit_rest(self.engine)
        if self.own_loop:
            with contextlib.suppress(ConsumerError):
                self._run_on_loop(self._lifespan.close(), _HOOKS)
        if self._loop_thread is not None:
            self._loop_thread.stop(_GRACE)
        elif self._dispatcher is not None:
            self._dispatcher.close()

    def _put_down(self) -> None:
        # It asks for handler threads, and may have tasks already.
        self._housekeeper.start()
        self.engine.stop()
        self.engine.abandon()

    # --- end -----------------------------------------------------------------------------------

    def until_stopped(self, timeout: float) -> Steps:
        """Wait for a signal or the engine's end; after a signal, drain."""
        if (yield None) is not News.SIGNAL:
            return
        if self._is_stopping:
            # Another thread's stop is under way, and has its time: up to a second signal.
            if (yield None) is News.SIGNAL:
                yield from self.give_up()
            return
        _log.info(
            "stopping: up to %g s for %d running handlers; a second signal ends them", timeout, self.engine.running
        )
        yield from self.drain(timeout)

    def drain(self, timeout: float) -> Steps:
        """Claim no more, wait up to ``timeout`` seconds for running handlers, and flush what they did.

        Handlers have all of that time. What cannot be stored, since the database is away, is given up so soon that the end
        still comes within it.
        """
        # First: it may end at once, and that is no death.
        self._is_stopping = True
        deadline = time.monotonic() + timeout
        try:
            self.engine.stop()
        except BaseException:  # it is just starting, and goes on
            self._is_stopping = False
            raise
        # A signal cuts the wait short.
        came = yield max(0.0, timeout - min(_LAST, timeout / 2))
        if came is None and self.engine.running:
            came = yield max(0.0, deadline - time.monotonic())
        if came is not News.ENDED:
            yield from self.give_up()

    def give_up(self) -> Steps:
        """Leave running handlers to the rescuer of another consumer, and wait for the engine's end."""
        self._is_stopping = self._gave_up = True
        if running := self.engine.running:
            _log.warning("%d handlers did not end in time: their tasks will run again", running)
        else:
            _log.warning("the outcomes of the last tasks could not be written in time: they will run again")
        if self._dispatcher is not None:
            self._dispatcher.cancel_soon()
        self.engine.abandon(_LAST)
        deadline = time.monotonic() + _GRACE
        while (left := deadline - time.monotonic()) > 0:
            if (yield left) is News.ENDED:
                return

    def finish(self) -> None:
        """After the drain: take down what is left. Raises ConsumerError: a shutdown hook failed.

        Several may call it, each from its thread (a ``stop`` beside a ``run``, and the interpreter's end): the first does it,
        the others wait until it has, and are told the same. What interrupts the first leaves the rest of it to the next.
        """
        # A hook that waits for another thread's stop would wait for ever.
        if not self._finishing.acquire(timeout=_TURN):
            raise ConsumerError(f"another thread is stopping the consumer, and has not ended within {_TURN:g} s")
        try:
            if not self._is_finished:
                self._is_finished = True
                try:
                    self._finish()
                except ConsumerError as error:
                    self._end_error = error
                except BaseException:
                    self._is_finished = False
                    raise
        finally:
            self._finishing.release()
        if self._end_error is not None:
            raise self._end_error

    def _finish(self) -> None:
        # Forgotten at the end: an interpreter that ends meanwhile waits for it.
        try:
            if self._dispatcher is not None and self._loop_thread is None:
                self._dispatcher.cancel_soon()
            ended = self._await_engine()
            try:
                self._run_on_loop(self._lifespan.close(), _HOOKS)
            finally:
                self._take_down(ended=ended)
        finally:
            _exit.forget(self)

    async def finish_async(self) -> None:
        """After the drain: take down what is left. Raises ConsumerError: a shutdown hook failed."""
        _exit.forget(self)
        if self._dispatcher is not None:
            self._dispatcher.close()
            if left := self._dispatcher.cancel():
                # Their own clean-up may take a moment.
                await asyncio.wait(left, timeout=_JOIN)
        ended = self._await_engine()
        try:
            await self._lifespan.close()
        finally:
            self._take_down(ended=ended)

    def _run_on_loop(self, work: Coroutine[Any, Any, None], timeout: float | None) -> None:
        """What a lifespan does: on the loop of the async handlers, where there is one."""
        if self._loop_thread is not None:
            self._loop_thread.run(work, timeout)
        else:
            run_without_loop(work)

    def _await_engine(self) -> bool:
        return self.engine.join(0.0 if self._died or self._gave_up else _GRACE)

    def _take_down(self, *, ended: bool) -> None:
        if self._loop_thread is not None:
            self._loop_thread.stop(_GRACE)
        if not ended:
            _log.error("the engine did not end within %g s: it is left behind", _GRACE)
            return
        # Handlers that were given up may hold their threads for ever: they are daemons.
        self._housekeeper.join(0.0 if self._gave_up else _JOIN)

    def check(self) -> None:
        """Raise ConsumerError if a part died before the stop."""
        if self._died:
            because = f": {self._failure}" if self._failure else "; the log says why"
            raise ConsumerError(f"the consumer ended by itself{because}") from self._failure

    # --- what happens to it --------------------------------------------------------------------

    def _look(self) -> None:
        """End, as a stop does, when too many threads are lost to handlers that nobody can end."""
        if self._is_stopping or self._failure is not None or (stuck := self.engine.stuck) <= self._stuck_limit:
            self._stuck_since = None
            return
        # Many may be late at once and gone in a moment: what they all wait for came back, or they look at `is_cancelled`.
        now = time.monotonic()
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < _STUCK:
            return
        self._failure = ConsumerError(
            f"{stuck} sync handlers go on although their time is up (stuck_limit is {self._stuck_limit}): only a new process is rid "
            "of them"
        )
        self._gave_up = True
        _log.error("stopping: %s", self._failure)
        self.engine.stop()
        last = threading.Timer(self._stop_timeout, self.engine.abandon, (_LAST,))
        last.daemon = True
        last.start()

    def _on_end(self, error: BaseException | None) -> None:
        if error is not None:
            self._failure = error
            with contextlib.suppress(Exception):
                self.engine.abandon()
        elif not self._is_stopping and self._failure is None and (cause := self.engine.failure):
            self._failure = ConsumerError(cause)
        # Also where a stop came while it was ending because of that.
        self._died = self._died or not self._is_stopping or self._failure is not None
        self.bell.ring()

    def _on_loop_death(self, error: BaseException) -> None:
        self._failure = error
        self._died = True
        self.engine.stop()
        self.engine.abandon()

    def is_own_thread(self) -> bool:
        """Whether the calling thread is one that this consumer's handlers run on."""
        return self._housekeeper.owns(threading.current_thread()) or (
            self._loop_thread is not None and self._loop_thread.ident == threading.get_ident()
        )

    def close_at_exit(self) -> None:
        """The interpreter ends and nobody stopped it: in order, but soon."""
        drive(self.bell, self.drain(_EXIT_TIMEOUT), signals=False)
        self.finish()


__all__ = ["Running", "SyncHandler"]
