"""The Python threads of a consumer or producer: handler threads, and the housekeeper that starts them and passes on logs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from fastq.logs import emit

if TYPE_CHECKING:
    from fastq._engine import Engine, ProducerCore

#: Seconds of one wait for news. It only bounds how long the thread can't be seen to be alive.
_WATCH: Final = 1.0

_log = logging.getLogger("fastq.engine")


class Watched(Protocol):
    """What has news for a housekeeper."""

    def watch(self, seconds: float) -> tuple[list[tuple[int, str, str]], int, bool]: ...


class Housekeeper:
    """A thread that hands on log records, starts handler threads when asked for, and says when the engine has ended.

    Args:
        engine: whose news it waits for.
        on_look: called on this thread each time that it has looked, once a second or more often.
        on_end: called on this thread once the engine has ended, after its last log record; or with the exception
            that ended this thread before.
    """

    def __init__(
        self, engine: Engine, on_look: Callable[[], None], on_end: Callable[[BaseException | None], None]
    ) -> None:
        self._engine = engine
        self._on_look = on_look
        self._on_end = on_end
        self._numbers: Iterator[int] = itertools.count(1)
        self._workers: list[threading.Thread] = []
        # Daemons all: a handler that never ends must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._main, name="fastq-housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for this thread and the handler threads: up to ``timeout`` seconds for all."""
        deadline = time.monotonic() + timeout
        for thread in (self._thread, *self._workers):
            thread.join(max(0.0, deadline - time.monotonic()))

    def owns(self, thread: threading.Thread) -> bool:
        """Whether it is one of the handler threads, or this one, on which policies and hooks are called for what is late."""
        return thread is self._thread or thread in self._workers

    def _main(self) -> None:
        ended = False
        try:
            while not ended:
                records, wanted, ended = self._engine.watch(_WATCH)
                emit(records)
                for _ in range(wanted):
                    self._hire()
                self._on_look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the consumer is told
            _log.exception("the housekeeper died")
            self._on_end(error)
        else:
            self._on_end(None)

    def _hire(self) -> None:
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        worker = threading.Thread(target=self._work, name=f"fastq-handler-{next(self._numbers)}", daemon=True)
        # Listed before it starts: its handler may ask whether it is one.
        self._workers.append(worker)
        worker.start()

    def _work(self) -> None:
        try:
            self._engine.work()
        except BaseException:  # noqa: BLE001 - the thread's last words
            _log.exception("a handler thread died")


def watch_logs(core: ProducerCore) -> None:
    """Hand on a producer's log records until it has ended, from a daemon thread of its own."""

    def main() -> None:
        ended = False
        while not ended:
            records, _, ended = core.watch(_WATCH)
            emit(records)

    threading.Thread(target=main, name="fastq-producer-logs", daemon=True).start()


def emit_rest(watched: Watched) -> None:
    """Hand on the log records that are there now."""
    with contextlib.suppress(Exception):
        emit(watched.watch(0.0)[0])


__all__ = ["Housekeeper", "Watched", "emit_rest", "watch_logs"]
