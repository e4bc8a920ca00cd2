"""``snapshot``: whether the rate lasts beside a transaction that holds a snapshot."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastq.bench._errors import BenchError
from fastq.bench._handlers import Kind
from fastq.bench._hold import Hold
from fastq.bench._load import WARM_UP, Load
from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._waiting import Progress, no_progress
from fastq.bench.enqueue import BATCH
from fastq.consumer import CONCURRENCY


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Steady work for ``seconds`` after a warm-up of 5 s, then as long beside a repeatable-read transaction."""

    seconds: float = 120.0
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
                whole = round(WARM_UP + 2 * self.seconds)
                with progress("running", whole, lambda: time.perf_counter() - began):
                    load.watch(began + WARM_UP)
                    free = began + WARM_UP
                    load.watch(free + self.seconds)
                    with Hold(session) as hold:
                        before, first = meter.read(), load.completed
                        held = time.perf_counter()
                        until = held + self.seconds
                        transactions = self._watch_held(load, hold, until)
                        after, last = meter.read(), load.completed
                with progress("checking", None, lambda: 0):
                    batches = load.finish()
            rate = load.looks.rate
            free_rate, held_rate = rate(free, free + self.seconds), rate(held, until)
            window = min(60.0, self.seconds / 2)
            figures = {
                "tasks": last - first,
                "seconds": self.seconds,
                "tasks_per_s": held_rate,
                "free_per_s": free_rate,
                "held_over_free": held_rate / free_rate,
                "last_over_first": rate(until - window, until) / rate(held, held + window),
                "window_s": window,
                "transactions_held": transactions,
                **usage(before, after, last - first),
                **batches,
            }
            settings = {
                "handler": self.handler,
                "concurrency": self.concurrency,
                "batch": self.batch,
                "payload_bytes": self.payload_bytes,
                "warm_up_s": WARM_UP,
            }
            return Result("snapshot", figures, settings, session.server, load.notes(free, until))

    @staticmethod
    def _watch_held(load: Load, hold: Hold, until: float) -> int:
        transactions = 0
        while (now := time.perf_counter()) < until:
            load.watch(min(until, now + 1))
            transactions = hold.check()
        if not transactions:
            raise BenchError("no transaction came while the snapshot was held")
        return transactions


__all__ = ["Snapshot"]
