"""``drain``: how fast tasks that were enqueued before are run and completed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from fastq.bench._handlers import Kind, Starts, bare_loop
from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result, per
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_completed
from fastq.bench._waiting import STALL, Progress, no_progress, wait_for
from fastq.bench.enqueue import BATCH
from fastq.consumer import CONCURRENCY
from fastq.errors import SettingsError

_TASKS: Final = 1_000_000
#: Seconds of work to load where handlers sleep and no number is given.
_WORK_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Drain:
    """``tasks`` tasks, loaded before; their handlers do nothing, or sleep.

    The clock runs from the start of the consumer, connecting and all, to the answer to its last commit.
    """

    tasks: int | None = None
    """None: 1,000,000; with ``work_ms`` as many as take ten seconds."""
    handler: Kind = "sync"
    concurrency: int = CONCURRENCY
    work_ms: float = 0.0
    """How long each handler sleeps. With it, the same sleep is done by as many threads or coroutines in a bare loop as well."""
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        tasks = self._count()
        work = self.work_ms / 1000
        maker = TaskMaker(self.payload_bytes)
        starts = Starts()
        with Session(dsn) as session, Meter(session) as meter:
            with session.producer() as producer, progress("loading", tasks, lambda: producer.stats()["enqueued"]):
                results = producer.enqueue_many(maker.stream(tasks), commit_every=BATCH)
            bare = [bare_loop(self.handler, work, self.concurrency)] if work else []
            consumer = session.consumer(starts.handler(self.handler, work), concurrency=self.concurrency)
            with meter.watching(), progress("draining", tasks, lambda: len(starts.ids)):
                before = meter.read()
                began = time.perf_counter()
                consumer.start()
                ended = wait_for("drain", lambda: consumer.stats()["completed"], tasks, stall=STALL + 2 * work)
                after = meter.read()
            stats = consumer.stats()
            consumer.stop()
            bare += [bare_loop(self.handler, work, self.concurrency)] if work else []
            with progress("checking", None, lambda: 0):
                check_completed(session.db, [results], starts)
            seconds = ended - began
            figures = {
                "tasks": tasks,
                "seconds": seconds,
                "tasks_per_s": tasks / seconds,
                **usage(before, after, tasks),
                "tasks_per_claim": per(stats["claimed"], stats["claims"]),
                "tasks_per_flush": per(stats["completed"], stats["flushes"]),
            }
            if bare:
                bare_rate = sum(count for count, _ in bare) / sum(took for _, took in bare)
                figures |= {"bare_per_s": bare_rate, "of_bare": tasks / seconds / bare_rate}
            settings = {
                "handler": self.handler,
                "concurrency": self.concurrency,
                "work_ms": self.work_ms,
                "payload_bytes": self.payload_bytes,
            }
            return Result("drain", figures, settings, session.server)

    def _count(self) -> int:
        if self.work_ms < 0:
            raise SettingsError(f"work_ms is {self.work_ms!r}, but must be 0 or more")
        if self.tasks is not None:
            return self.tasks
        if not self.work_ms:
            return _TASKS
        return min(_TASKS, max(self.concurrency, round(self.concurrency * _WORK_SECONDS / (self.work_ms / 1000))))


__all__ = ["Drain"]
