"""What a stretch of work costs: CPU of this process, CPU of the server's, bytes of its log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from fastq.bench._processes import cpu_seconds, is_here
from fastq.bench._session import Session
from fastq.errors import DatabaseError

#: Seconds between two looks for backends that come and go. What one uses between its last look and its end is not seen.
_LOOK_EACH: Final = 0.25


@dataclass(frozen=True, slots=True)
class Reading:
    """All counters at one moment. None: it can't be read here."""

    client_cpu: float
    """Seconds that this process has used, all threads."""
    server_cpu: float | None
    """Seconds that the backends of its sessions have used, of those that have ended too."""
    other_cpu: float | None
    """Seconds that the server's processes have used that serve no session."""
    wal_bytes: int | None
    """Bytes of the server's log."""


class Meter:
    """Reads the counters, over a connection of its own. For one thread, beside which ``watching`` has its own.

    Args:
        session: whose producers and consumers are measured.

    Attributes:
        is_local: the server's processes can be seen here.
    """

    def __init__(self, session: Session) -> None:
        self._name = session.name
        self._db = session.look()
        self._lock = threading.Lock()
        [(pid, age)] = self._db.query("bench_own_backend")
        self.is_local = is_here(pid, age)
        self._may_read_wal = True
        self._backends: dict[int, float] = {}
        self._others: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._db.close()

    def read(self) -> Reading:
        """The counters now. Raises DatabaseError."""
        client_cpu = time.process_time()
        with self._lock:
            self._look()
            return Reading(
                client_cpu,
                sum(self._backends.values()) if self.is_local else None,
                sum(self._others.values()) if self.is_local else None,
                self._read_wal(),
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, a thread looks for backends that come and go."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOOK_EACH):
                with self._lock:
                    try:
                        self._look()
                    except DatabaseError:
                        # The next reading says it.
                        return

        thread = threading.Thread(target=watch, name="fastq-bench-meter", daemon=True)
        if self.is_local:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self.is_local:
                thread.join()

    def commits(self) -> int:
        """Transactions committed in the database so far, our own too. Raises DatabaseError."""
        with self._lock:
            return int(self._db.query("bench_commits")[0][0])

    def _look(self) -> None:
        if not self.is_local:
            return
        for pid, is_backend in self._db.query("bench_processes", self._name):
            used = cpu_seconds(pid)
            if used is not None:
                (self._backends if is_backend else self._others)[pid] = used

    def _read_wal(self) -> int | None:
        if not self._may_read_wal:
            return None
        try:
            return int(self._db.query("bench_wal")[0][0])
        except DatabaseError:
            # Some managed servers have no such log to ask for.
            if self._db.is_closed:
                raise
            self._may_read_wal = False
            return None


def usage(before: Reading, after: Reading, tasks: int) -> dict[str, float | None]:
    """What one of ``tasks`` cost between two readings, in microseconds and bytes."""
    return {
        "client_cpu_us": _each(before.client_cpu, after.client_cpu, tasks, 1e6),
        "server_cpu_us": _each(before.server_cpu, after.server_cpu, tasks, 1e6),
        "server_other_cpu_us": _each(before.other_cpu, after.other_cpu, tasks, 1e6),
        "wal_bytes": _each(before.wal_bytes, after.wal_bytes, tasks, 1),
    }


def _each(before: float | None, after: float | None, tasks: int, scale: float) -> float | None:
    if before is None or after is None or not tasks:
        return None
    return (after - before) / tasks * scale


__all__ = ["Meter", "Reading", "usage"]
