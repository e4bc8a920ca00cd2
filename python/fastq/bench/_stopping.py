"""Ctrl-C and SIGTERM end a benchmark, but not its clean-up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

#: The last one is what a closed terminal sends; not everywhere.
_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: Seconds for which further signals do nothing: people press twice.
_PATIENCE: Final = 10.0


class Stopped(KeyboardInterrupt):
    """A signal came.

    Attributes:
        signal: which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopSignals:
    """While inside, a signal raises `Stopped` on the main thread. For some seconds more of them do nothing, so that the clean-up ends."""

    def __init__(self) -> None:
        self._came_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Ignored stays ignored: so a shell says that Ctrl-C is not meant for its background commands.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._previous.items():
            # None: it was set by code that is not Python's, and can't be put back.
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._came_at is None or now - self._came_at > _PATIENCE:
            self._came_at = now
            raise Stopped(number)


def surely(clean_up: Callable[[], object]) -> None:
    """Run ``clean_up`` to its end: once more if a signal interrupted it."""
    try:
        clean_up()
    except Stopped:
        clean_up()
        raise


__all__ = ["StopSignals", "Stopped", "surely"]
