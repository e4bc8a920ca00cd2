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
#: Seconds between two looks: at the end, before anything has come, and at most.
_SHORTEST: Final = 0.001
_FIRST: Final = 0.01
_LONGEST: Final = 0.05


def no_progress(_what: str, _total: int | None, _done: Callable[[], float]) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


def wait_for(what: str, done: Callable[[], float], total: int, *, stall: float = STALL) -> float:
    """Wait until ``done`` gives ``total``. Returns when that was, by ``time.perf_counter``.

    Asks the less often the farther it is, and often at the end.

    Raises:
        BenchError: no progress for ``stall`` seconds.
    """
    at = changed = time.perf_counter()
    found = done()
    rate = 0.0
    while found < total:
        # Half of the way that is left at the fastest it has been: never far beyond the end.
        time.sleep(max(_SHORTEST, min(_LONGEST, (total - found) / rate / 2 if rate else _FIRST)))
        before, last, found, at = at, found, done(), time.perf_counter()
        if found != last:
            rate, changed = max(rate, (found - last) / (at - before)), at
        elif at - changed > stall:
            raise BenchError(f"{what}: stopped at {found:,.0f} of {total:,}; nothing more came for {stall:g} s")
    return time.perf_counter()


__all__ = ["STALL", "Progress", "no_progress", "wait_for"]
