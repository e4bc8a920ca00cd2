"""``enqueue``: how fast tasks are written in bulk."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result, per
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_enqueued
from fastq.bench._waiting import Progress, no_progress

#: Tasks a commit unless it is said otherwise.
BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Enqueue:
    """``tasks`` tasks, made as they are written, committed every ``batch``.

    The clock runs from the call, with no connection made yet, to its return after the last commit.
    """

    tasks: int = 1_000_000
    batch: int = BATCH
    payload_bytes: int = PAYLOAD_BYTES
    tokens: bool = False
    """Each task has an idempotency token of its own."""

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session` and `Producer.enqueue_many` raise."""
        maker = TaskMaker(self.payload_bytes, tokens=self.tokens)
        with Session(dsn) as session, Meter(session) as meter:
            producer = session.producer()
            with meter.watching(), progress("enqueueing", self.tasks, lambda: producer.stats()["enqueued"]):
                before = meter.read()
                began = time.perf_counter()
                results = producer.enqueue_many(maker.stream(self.tasks), commit_every=self.batch)
                seconds = time.perf_counter() - began
                after = meter.read()
            stats = producer.stats()
            producer.close()
            check_enqueued(session.db, [results], tokens=self.tokens)
            return Result(
                "enqueue",
                {
                    "tasks": self.tasks,
                    "seconds": seconds,
                    "tasks_per_s": self.tasks / seconds,
                    **usage(before, after, self.tasks),
                    "tasks_per_commit": per(self.tasks, stats["commits"]),
                },
                {"batch": self.batch, "payload_bytes": self.payload_bytes, "tokens": self.tokens},
                session.server,
            )


__all__ = ["BATCH", "Enqueue"]
