"""A transaction that holds a snapshot, as a long report or a backup does."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from fastq.bench._errors import BenchError
from fastq.bench._session import Session


class Hold:
    """A repeatable-read transaction in the benchmark's database, from the start to the end of the block.

    While it is open, the server can't remove rows that have died since. `check` sees to it that this is so.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._db = session.look()

    def __enter__(self) -> Self:
        try:
            self._db.query("bench_keep_session")
            self._db.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
            [(self._pid, isolation)] = self._db.query("bench_hold_snapshot")
            self._xmin, _ = self._look()
        except BaseException:
            self._db.close()
            raise
        if isolation != "repeatable read":
            self._db.close()
            raise BenchError(f"the transaction that was to hold a snapshot is {isolation}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._db.close()

    def check(self) -> int:
        """That the snapshot stands where it stood. Returns how many transactions have come since. Raises BenchError."""
        xmin, age = self._look()
        if xmin != self._xmin:
            raise BenchError(f"the snapshot that was to be held has moved from transaction {self._xmin} to {xmin}")
        return age

    def _look(self) -> tuple[int, int]:
        rows = self._session.db.query("bench_held_snapshot", self._pid)
        if not rows or rows[0][0] is None:
            raise BenchError("the transaction that was to hold a snapshot holds none, or has ended")
        return int(rows[0][0]), int(rows[0][1])


__all__ = ["Hold"]
