"""Waiting for the end of the work without taking the processor from those who do it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

from fastq.bench._errors import BenchError

#: Told what is done, how much of it there is (None: unknown) and how to ask how far it is; shows it until it is left.
Progress: TypeAlias = Callable[[str, int | None, Callable[[], float]], AbstractContextManager[None]]

#: Seconds without any progress after which it is given up: longer than any of fastq's own waits.
STALL: Final = 60.0
_SHORTEST: Final = 0.001
_LONGEST: Final = 0.25


def no_progress(_what: str, _total: int | None, _done: Callable[[], float]) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


def wait_for(what: str, done: Callable[[], float], total: int, *, stall: float = STALL) -> float:
    """Wait until ``done`` gives ``total``. Returns when that was, by ``time.perf_counter``.

    Asks the less often the farther it is, and often at the end.

    Raises:
        BenchError: no progress for ``stall`` seconds.
    """
    began = changed = time.perf_counter()
    first = last = done()
    while last < total:
        now = time.perf_counter()
        rate = (last - first) / (now - began) if last > first else 0.0
        time.sleep(max(_SHORTEST, min(_LONGEST, (total - last) / rate / 2)) if rate else _SHORTEST * 10)
        found = done()
        now = time.perf_counter()
        if found != last:
            last, changed = found, now
        elif now - changed > stall:
            raise BenchError(f"{what}: stopped at {last:,.0f} of {total:,}; nothing more came for {stall:g} s")
    return time.perf_counter()


__all__ = ["STALL", "Progress", "no_progress", "wait_for"]
