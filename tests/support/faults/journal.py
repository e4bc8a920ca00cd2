"""What handlers in worker processes wrote down while they ran: an audit that asks neither the tables nor the engine's counters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """What a handler wrote down."""

    word: str
    """``start``; then ``end``, ``fail`` (as ordered), ``broke`` (by an error of its own transaction) or ``strange`` (with options that are
    not its own)."""
    id: int
    attempt: int
    pid: int
    at: float
    """When, by the monotonic clock, which all processes of a machine share."""


class Journal:
    """What handlers in worker processes did, in order. Each line is one write to a file that is only appended to, so nothing of it
    is lost with a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def entries(self, word: str, *, pid: int | None = None, after: float = 0.0) -> list[Entry]:
        """Those of this word, of one process or all, written later than ``after``."""
        found = []
        for line in self.path.read_text().splitlines():
            is_word, id_, attempt, is_pid, at = line.split()
            if is_word == word and pid in (None, int(is_pid)) and float(at) > after:
                found.append(Entry(is_word, int(id_), int(attempt), int(is_pid), float(at)))
        return found

    def started(self, *, pid: int | None = None, after: float = 0.0) -> list[int]:
        """The ids of tasks in the order in which they started."""
        return [entry.id for entry in self.entries("start", pid=pid, after=after)]
