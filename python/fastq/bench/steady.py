"""``steady``: how fast tasks complete while as many are enqueued, in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastq.bench._handlers import Kind
from fastq.bench._load import WARM_UP, Load
from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._waiting import Progress, no_progress
from fastq.bench.enqueue import BATCH
from fastq.consumer import CONCURRENCY


@dataclass(frozen=True, slots=True)
class Steady:
    """A producer and a consumer beside each other, with 5,000 to 50,000 tasks between them, for ``seconds`` after a warm-up of 5 s."""

    seconds: float = 30.0
    handler: Kind = "sync"
    concurrency: int = CONCURRENCY
    batch: int = BATCH
    """Tasks a commit of the producer's."""
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        maker = TaskMaker(self.payload_bytes)
        with Session(dsn) as session, Meter(session) as meter:
            with (
                Load(session, maker, batch=self.batch, handler=self.handler, concurrency=self.concurrency) as load,
                meter.watching(),
            ):
                began = time.perf_counter()
                since = began + WARM_UP
                until = since + self.seconds
                with progress("running", round(until - began), lambda: time.perf_counter() - began):
                    load.watch(since)
                    before, first = meter.read(), load.completed
                    load.watch(until)
                    after, last = meter.read(), load.completed
                with progress("checking", None, lambda: 0):
                    batches = load.finish()
            backlogs = load.looks.backlog(since, until)
            figures = {
                "tasks": last - first,
                "seconds": self.seconds,
                "tasks_per_s": load.looks.rate(since, until),
                **usage(before, after, last - first),
                **batches,
                "backlog_least": min(backlogs),
                "backlog_most": max(backlogs),
            }
            settings = {
                "handler": self.handler,
                "concurrency": self.concurrency,
                "batch": self.batch,
                "payload_bytes": self.payload_bytes,
                "warm_up_s": WARM_UP,
            }
            return Result("steady", figures, settings, session.server, load.notes(since, until))


__all__ = ["Steady"]
