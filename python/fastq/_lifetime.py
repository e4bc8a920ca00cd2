"""Waiting for what ends a consumer: a signal, a time limit, its engine. Written once, driven from sync and async code."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Final

from fastq.errors import FastqError


class News(enum.Enum):
    """What a wait can bring."""

    ENDED = "the engine has ended"
    SIGNAL = "SIGTERM or SIGINT came"


Sink = Callable[[News], None]
#: Yields how many seconds to wait (None: for ever) and is sent what came (None: nothing, the time is up).
Steps = Generator[float | None, News | None, None]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Seconds that a thread waits at a stretch. Python runs a signal's handler between two bytecodes: one that comes just as the main
#: thread lets go of the interpreter to wait (which takes a while beside busy threads) is not run before it wakes up.
_SLICE: Final = 0.5


class Bell:
    """Tells all who wait that the engine has ended, also those who come later. For any thread, but not for signal handlers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sinks: set[Sink] = set()
        self._rung = False

    def ring(self) -> None:
        """The engine has ended."""
        with self._lock:
            self._rung = True
            sinks = list(self._sinks)
        for sink in sinks:
            sink(News.ENDED)

    @contextlib.contextmanager
    def heard_by(self, sink: Sink) -> Iterator[None]:
        """While inside, ``sink`` is called, from any thread; at once if the bell has rung before."""
        with self._lock:
            self._sinks.add(sink)
            rung = self._rung
        if rung:
            sink(News.ENDED)
        try:
            yield
        finally:
            with self._lock:
                self._sinks.discard(sink)


def drive(bell: Bell, steps: Steps, *, signals: bool) -> None:
    """Go through ``steps``, waiting on this thread. With ``signals`` and on the main thread, signals are news."""
    # Its put may be called from a signal handler that interrupts its get: a Queue's may not.
    news: queue.SimpleQueue[News] = queue.SimpleQueue()
    with bell.heard_by(news.put), _on_stop_signals(news.put if signals else None), contextlib.suppress(StopIteration):
        wait = next(steps)
        while True:
            deadline = None if wait is None else time.monotonic() + wait
            came: News | None = None
            while came is None:
                left = _left(deadline)
                with contextlib.suppress(queue.Empty):
                    came = news.get(timeout=left)
                if left == 0:
                    break
            wait = steps.send(came)


async def drive_async(bell: Bell, steps: Steps, *, signals: bool) -> None:
    """Go through ``steps``, waiting on the running loop. With ``signals`` and on the main thread, signals are news."""
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[News] = asyncio.Queue()

    def sink(came: News) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(news.put_nowait, came)

    with bell.heard_by(sink), _on_stop_signals(sink if signals else None), contextlib.suppress(StopIteration):
        wait = next(steps)
        while True:
            deadline = None if wait is None else time.monotonic() + wait
            came: News | None = None
            while came is None:
                left = _left(deadline)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        came = await news.get()
                if left == 0:
                    break
            wait = steps.send(came)


def _left(deadline: float | None) -> float:
    return _SLICE if deadline is None else max(0.0, min(deadline - time.monotonic(), _SLICE))


@contextlib.contextmanager
def _on_stop_signals(sink: Sink | None) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT go to ``sink``; then to whom they went before."""
    if sink is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        sink(News.SIGNAL)

    # Ignored stays ignored: so a shell says that Ctrl-C is not meant for its background commands.
    previous = {number: before for number in _SIGNALS if (before := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in previous.items():
            # None: it was set by code that is not Python's, and can't be put back.
            signal.signal(number, before if before is not None else signal.SIG_DFL)


def has_running_loop() -> bool:
    """Whether an event loop runs in this thread, which a wait would stop."""
    return asyncio._get_running_loop() is not None  # noqa: SLF001 - 30 ns; the public one raises where there is none


def refuse_running_loop(what: str, instead: str, error: type[FastqError]) -> None:
    """Raise ``error`` where an event loop runs in this thread: ``what`` would make all that runs on it wait."""
    if has_running_loop():
        raise error(f"{what} was called where an event loop runs, and would stop it: use {instead}")


__all__ = ["Bell", "News", "Steps", "drive", "drive_async", "has_running_loop", "refuse_running_loop"]
