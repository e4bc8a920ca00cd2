"""What handlers write down: each run of a task, when it started, how it ended, and what it found.

Each worker process has a file of its own, mapped into memory. What is stored there is the kernel's at once, so a SIGKILL of
the worker takes nothing of it away, and no run pays a system call. It costs a handler about a microsecond.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

# result, ended_at, started_at, line, state: what says that a slot is in use is written last, so a slot that a kill cut off in
# the middle counts as none, before its handler has done anything.
_SLOT: Final = struct.Struct("<QddIB3x")
_START: Final = struct.Struct("<dIB")
_START_AT: Final = 16
_RESULT: Final = struct.Struct("<Qd")
_STATE_AT: Final = 28
_PATTERN: Final = "runs-*.bin"


class State(IntEnum):
    """How far a run came."""

    STARTED = 1
    """It started, and no end of it is on record: its worker was killed."""
    RETURNED = 2
    RAISED = 3


class Run(NamedTuple):
    """One run of the task of one line."""

    result: int
    """What its handler found; 0 where it did not return."""
    ended_at: float
    """Seconds since the epoch; 0 where it did not end."""
    started_at: float
    """Seconds since the epoch."""
    line: int
    """The task's line in the file, from 1."""
    state: int
    """A `State`."""


@dataclass(slots=True)
class Record:
    """What a handler sets while it runs."""

    result: int = 0


class RunLog:
    """The file of this process. For any number of threads.

    Args:
        folder: where it is made.
        slots: how many runs it holds; the file is sparse, so room that is not used costs nothing.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        fd = os.open(folder / _PATTERN.replace("*", str(os.getpid())), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, slots * _SLOT.size)
            self._map = mmap.mmap(fd, slots * _SLOT.size)
        finally:
            os.close(fd)
        # next() of it is one step for the interpreter: no lock is needed.
        self._free = itertools.count()

    @contextmanager
    def record(self, line: int) -> Iterator[Record]:
        """Write down a run of the task of ``line``: its start now, and its end when the block is left."""
        at = next(self._free) * _SLOT.size
        _START.pack_into(self._map, at + _START_AT, time.time(), line, State.STARTED)
        record = Record()
        try:
            yield record
        except Exception:
            self._end(at, 0, State.RAISED)
            raise
        self._end(at, record.result, State.RETURNED)

    def _end(self, at: int, result: int, state: State) -> None:
        _RESULT.pack_into(self._map, at, result, time.time())
        self._map[at + _STATE_AT] = state


def read_runs(folder: Path) -> dict[int, list[Run]]:
    """The runs on record, by the process id of the worker that wrote them down."""
    found = {}
    for path in folder.glob(_PATTERN):
        pid = int(path.stem.partition("-")[2])
        runs = []
        with path.open("rb") as file:
            # Slots are used in order, but for the few that threads are about to use: a long stretch of zeros is the end.
            while block := file.read(_SLOT.size * 4096):
                used = [run for run in map(Run._make, _SLOT.iter_unpack(block)) if run.state]
                if not used:
                    break
                runs += used
        found[pid] = runs
    return found


__all__ = ["Record", "Run", "RunLog", "State", "read_runs"]
