"""``latency``: how long a task waits for its handler where there is time for it at once, and what waiting for one costs."""

from __future__ import annotations

import queue
import random
import time
from dataclasses import dataclass
from typing import Final

from fastq._engine import TaskInfo
from fastq.bench._errors import BenchError
from fastq.bench._handlers import Handler, Kind, Starts
from fastq.bench._meter import Meter, Reading
from fastq.bench._result import Result, percentile
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_completed
from fastq.bench._waiting import STALL, Progress, no_progress, wait_for
from fastq.consumer import CONCURRENCY, Consumer
from fastq.task import Enqueued

#: Seconds between a task's start and the next one's enqueue.
_GAPS: Final = (0.020, 0.200)
#: Seconds after the last task until the consumer counts as idle.
_SETTLE: Final = 2.0

_Started = queue.SimpleQueue[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Latency:
    """One task at a time at random gaps of 20 to 200 ms, from the enqueue call to the first line of its handler; then nothing."""

    tasks: int = 300
    handler: Kind = "sync"
    concurrency: int = CONCURRENCY
    idle_seconds: float = 10.0
    """How long the same consumer is watched with nothing to do."""
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        maker = TaskMaker(self.payload_bytes)
        starts = Starts()
        started: _Started = queue.SimpleQueue()
        with Session(dsn) as session, Meter(session) as meter:
            producer = session.producer()
            consumer = session.consumer(_handler(self.handler, starts, started), concurrency=self.concurrency)
            consumer.start()
            results: list[Enqueued] = []
            waits: list[float] = []
            answers: list[float] = []
            with progress("enqueueing", self.tasks, lambda: len(waits)):
                for _ in range(self.tasks):
                    time.sleep(random.uniform(*_GAPS))  # noqa: S311 - no secret
                    task = maker.make()
                    called = time.perf_counter()
                    results.append(producer.enqueue(task))
                    answers.append(time.perf_counter() - called)
                    waits.append(_wait_for_start(started, results[-1].id) - called)
            wait_for("latency", lambda: consumer.stats()["completed"], self.tasks)
            # What is watched is the consumer alone.
            producer.close()
            with progress("idle", None, lambda: 0):
                idle = self._watch_idle(consumer, meter)
            consumer.stop()
            check_completed(session.db, [results], starts)
            waits.sort()
            answers.sort()
            figures = {
                "tasks": self.tasks,
                "p50_ms": percentile(waits, 0.5) * 1000,
                "p90_ms": percentile(waits, 0.9) * 1000,
                "p99_ms": percentile(waits, 0.99) * 1000,
                "most_ms": waits[-1] * 1000,
                "enqueue_p50_ms": percentile(answers, 0.5) * 1000,
                "enqueue_p99_ms": percentile(answers, 0.99) * 1000,
                **idle,
            }
            settings = {
                "handler": self.handler,
                "concurrency": self.concurrency,
                "payload_bytes": self.payload_bytes,
                "idle_seconds": self.idle_seconds,
            }
            return Result("latency", figures, settings, session.server)

    def _watch_idle(self, consumer: Consumer, meter: Meter) -> dict[str, float | None]:
        """The consumer's statements by its own count, the commits of the whole database by the server's, and processor time."""
        time.sleep(_SETTLE)
        before, commits, statements = meter.read(), meter.commits(), consumer.stats()["statements"]
        began = time.perf_counter()
        time.sleep(self.idle_seconds)
        seconds = time.perf_counter() - began
        statements = consumer.stats()["statements"] - statements
        # First this, so that none of the meter's own statements are in it.
        commits = meter.commits() - commits
        after = meter.read()
        return {
            "idle_statements_per_s": statements / seconds,
            "idle_commits_per_s": commits / seconds,
            "idle_cpu_percent": (after.client_cpu - before.client_cpu) / seconds * 100,
            "idle_server_cpu_percent": _percent(before, after, seconds),
        }


def _percent(before: Reading, after: Reading, seconds: float) -> float | None:
    if before.server_cpu is None or after.server_cpu is None:
        return None
    return (after.server_cpu - before.server_cpu) / seconds * 100


def _handler(kind: Kind, starts: Starts, started: _Started) -> Handler:
    note, now, tell = starts.ids.append, time.perf_counter, started.put
    if kind == "async":

        async def note_async(task: TaskInfo) -> None:
            at = now()
            note(task.id)
            tell((task.id, at))

        return note_async

    def note_sync(task: TaskInfo) -> None:
        at = now()
        note(task.id)
        tell((task.id, at))

    return note_sync


def _wait_for_start(started: _Started, id_: int) -> float:
    try:
        found, at = started.get(timeout=STALL)
    except queue.Empty:
        raise BenchError(f"task {id_} did not start within {STALL:g} s") from None
    if found != id_:
        raise BenchError(f"task {found} started instead of {id_}")
    return at


__all__ = ["Latency"]
