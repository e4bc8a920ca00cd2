"""Producer and consumer at work in one process, with a backlog between two bounds."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from fastq.bench._errors import BenchError
from fastq.bench._handlers import Kind, Starts
from fastq.bench._result import per
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker
from fastq.bench._verify import check_completed
from fastq.bench._waiting import STALL, wait_for
from fastq.errors import SettingsError
from fastq.task import Enqueued, Task

#: Tasks that wait or run, between which the backlog is kept.
LEAST: Final = 5_000
MOST: Final = 50_000
#: Seconds at the start that no figure counts.
WARM_UP: Final = 5.0
#: Seconds between two looks at the counters.
_LOOK_EACH: Final = 0.05
#: Seconds that the producer waits for room.
_PAUSE: Final = 0.002


@dataclass(slots=True)
class Looks:
    """How many tasks had completed, and how many were waiting, at each look."""

    times: list[float] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    backlogs: list[int] = field(default_factory=list)

    def add(self, at: float, completed: int, backlog: int) -> None:
        """At this time by ``time.perf_counter``."""
        self.times.append(at)
        self.completed.append(completed)
        self.backlogs.append(backlog)

    def rate(self, since: float, until: float) -> float:
        """Tasks completed a second, between the looks next to these times. Raises BenchError if there are no two."""
        first = bisect.bisect_left(self.times, since)
        last = bisect.bisect_right(self.times, until) - 1
        if last <= first:
            raise BenchError("the time measured is too short to tell a rate")
        return (self.completed[last] - self.completed[first]) / (self.times[last] - self.times[first])

    def backlog(self, since: float, until: float) -> list[int]:
        """All backlogs seen between these times."""
        return self.backlogs[bisect.bisect_left(self.times, since) : bisect.bisect_right(self.times, until)]


class Load:
    """A producer in a thread of its own and a consumer, from the start to the end of the block; `finish` ends and checks them.

    Args:
        session: where they work.
        maker: makes the tasks.
        batch: tasks a commit.
        handler: the handlers' kind.
        concurrency: of the consumer.
    """

    def __init__(self, session: Session, maker: TaskMaker, *, batch: int, handler: Kind, concurrency: int) -> None:
        if not 1 <= batch <= MOST - LEAST:
            raise SettingsError(
                f"batch is {batch!r}, but must be from 1 to {MOST - LEAST:,}, for a backlog of {LEAST:,} to {MOST:,}"
            )
        self._session = session
        self._maker = maker
        self._batch = batch
        self._starts = Starts()
        self._consumer = session.consumer(self._starts.handler(handler), concurrency=concurrency)
        self._producer = session.producer()
        self._results: Sequence[Enqueued] = ()
        self._is_consuming = False
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="fastq-bench-producer", daemon=True)
        self.looks = Looks()

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            wait_for("the first tasks", self._enqueued_so_far, MOST // self._batch * self._batch)
            self._consumer.start()
            self._is_consuming = True
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def notes(self, since: float, until: float) -> tuple[str, ...]:
        """What must be known of the backlog between these times."""
        backlogs = self.looks.backlog(since, until)
        low = sum(backlog < LEAST for backlog in backlogs)
        if not low:
            return ()
        share = f"{low / len(backlogs):.1%}"
        note = f"for {share} of the time the backlog was under {LEAST:,} ({min(backlogs):,} at the least)"
        return (f"{note}: the producer was slower than the consumer could have been",)

    @property
    def completed(self) -> int:
        """Tasks whose completion is stored."""
        return int(self._consumer.stats()["completed"])

    def watch(self, until: float) -> None:
        """Look at the counters until that time. Raises BenchError if producer or consumer stand still."""
        while (now := time.perf_counter()) < until:
            enqueued, completed = self._enqueued_so_far(), self.completed
            # Between the two looks some more may have come and gone.
            self.looks.add(now, completed, max(0, enqueued - completed))
            self._check_consumer()
            time.sleep(max(0.0, min(_LOOK_EACH, until - now)))

    def finish(self) -> dict[str, float | None]:
        """Enqueue no more, wait for the rest, and check what became of all. Returns the sizes of batches. Raises BenchError."""
        self._end()
        self._check_producer()
        wait_for("the rest", lambda: self.completed, len(self._results))
        consumed, produced = self._consumer.stats(), self._producer.stats()
        self._consumer.stop()
        self._producer.close()
        check_completed(self._session.db, [self._results], self._starts)
        return {
            "tasks_per_claim": per(consumed["claimed"], consumed["claims"]),
            "tasks_per_flush": per(consumed["completed"], consumed["flushes"]),
            "tasks_per_commit": per(produced["enqueued"], produced["commits"]),
        }

    def _check_consumer(self) -> None:
        times, completed = self.looks.times, self.looks.completed
        since = bisect.bisect_left(times, times[-1] - STALL) if times else 0
        if since > 0 and completed[since] == completed[-1]:
            raise BenchError(f"no task completed for {STALL:g} s, after {completed[-1]:,}")

    def _check_producer(self) -> None:
        if self._failure is not None:
            raise BenchError(f"the producer failed: {self._failure}") from self._failure

    def _enqueued_so_far(self) -> int:
        self._check_producer()
        return int(self._producer.stats()["enqueued"])

    def _produce(self) -> None:
        try:
            # One stream, so that tasks are made while those before them are committed.
            self._results = self._producer.enqueue_many(self._stream(), commit_every=self._batch)
        except BaseException as error:  # noqa: BLE001 - the main thread says it
            self._failure = error

    def _stream(self) -> Iterator[Task]:
        """Batches, as long as there is room for them. Between two of them no transaction is open."""
        made = completed = 0
        while not self._ended.is_set():
            if made - completed + self._batch <= MOST:
                made += self._batch
                yield from self._maker.stream(self._batch)
            elif made - (completed := self._completed_so_far()) + self._batch > MOST:
                self._ended.wait(_PAUSE)

    def _completed_so_far(self) -> int:
        return self.completed if self._is_consuming else 0


__all__ = ["LEAST", "MOST", "WARM_UP", "Load", "Looks"]
