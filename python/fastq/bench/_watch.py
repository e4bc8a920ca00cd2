"""What retention does meanwhile: when a leaf was emptied, and how large the tables are, looked at over a connection of its own."""

from __future__ import annotations

import bisect
import threading
import time
from types import TracebackType
from typing import Final, Self

from fastq.bench._errors import BenchError
from fastq.bench._session import Session
from fastq.errors import DatabaseError

#: Seconds between two looks at the leaves: within such a time it is known when one was emptied.
_LOOK_EACH: Final = 0.1
#: Seconds before a look that count as well: the look itself takes some.
_MARGIN: Final = 0.05


class RetentionWatch:
    """Looks at the tables in a thread of its own while inside.

    Args:
        session: whose tables.
        each: seconds between two looks at their sizes.
    """

    def __init__(self, session: Session, each: float) -> None:
        self._session = session
        self._each = each
        self._left = threading.Event()
        self._failure: DatabaseError | None = None
        self._thread = threading.Thread(target=self._watch, name="fastq-bench-watch", daemon=True)
        self.sizes: list[dict[str, float]] = []
        """Over time: seconds since the start, megabytes of tables, leaves in use."""
        self._began: list[float] = []
        self._ended: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    @property
    def emptied(self) -> int:
        """Leaves that were emptied so far."""
        return len(self._ended)

    def is_emptying(self, began: float, ended: float) -> bool:
        """Whether a leaf was emptied within this time (by ``time.perf_counter``), as far as can be told."""
        first = bisect.bisect_left(self._ended, began)
        return first < len(self._ended) and self._began[first] <= ended

    def check(self) -> None:
        """Raises BenchError: it could not look."""
        if self._failure is not None:
            raise BenchError(f"the tables could not be looked at: {self._failure}") from self._failure

    def _watch(self) -> None:
        began = time.perf_counter()
        closed: set[int] = set()
        last = due = began
        try:
            with self._session.look() as db:
                while True:
                    now = time.perf_counter()
                    states: dict[int, str] = dict(db.query("bench_leaves"))
                    seen = time.perf_counter()
                    if any(states[no] != "closed" for no in closed):
                        self._began.append(last - _MARGIN)
                        self._ended.append(seen)
                    closed = {no for no, state in states.items() if state == "closed"}
                    if now >= due:
                        due += self._each
                        names = ("contents", "completions", "archive", "others")
                        [sizes] = db.query("bench_sizes", self._session.name)
                        megabytes = {f"{name}_mb": size / 1e6 for name, size in zip(names, sizes, strict=True)}
                        used = sum(state != "empty" for state in states.values())
                        self.sizes.append({"at_s": now - began, **megabytes, "leaves": used, "emptied": self.emptied})
                    last = now
                    if self._left.wait(_LOOK_EACH):
                        return
        except DatabaseError as error:
            self._failure = error


__all__ = ["RetentionWatch"]
