"""``single``: how fast many callers enqueue one task each at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastq.bench._errors import BenchError
from fastq.bench._loops import run_coroutine
from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result, per, percentile
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_enqueued
from fastq.bench._waiting import Progress, no_progress
from fastq.producer import Producer
from fastq.task import Enqueued

#: Callers unless it is said otherwise.
COROUTINES: Final = 64
THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class Single:
    """``tasks`` tasks, each by a call of its own, from coroutines or threads that wait for each answer.

    The clock runs from the first call, with no connection made yet, to the last return.
    """

    tasks: int = 200_000
    coroutines: int | None = None
    threads: int | None = None
    """At most one of the two is given; neither: 64 coroutines."""
    payload_bytes: int = PAYLOAD_BYTES
    tokens: bool = False
    """Each task has an idempotency token of its own."""

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session` and `Producer.enqueue` raise."""
        maker = TaskMaker(self.payload_bytes, tokens=self.tokens)
        callers = self.threads or self.coroutines or COROUTINES
        shares = [self.tasks // callers + (number < self.tasks % callers) for number in range(callers)]
        with Session(dsn) as session, Meter(session) as meter:
            producer = session.producer()
            calls = [_Calls(producer, maker, share) for share in shares]
            with meter.watching(), progress("enqueueing", self.tasks, lambda: producer.stats()["enqueued"]):
                before = meter.read()
                seconds = _run_threads(calls) if self.threads else run_coroutine(lambda: _run_coroutines(calls))
                after = meter.read()
            stats = producer.stats()
            producer.close()
            check_enqueued(session.db, [each.results for each in calls], tokens=self.tokens)
            waits = sorted(wait for each in calls for wait in each.waits)
            return Result(
                "single",
                {
                    "tasks": self.tasks,
                    "seconds": seconds,
                    "tasks_per_s": self.tasks / seconds,
                    "p50_ms": percentile(waits, 0.5) * 1000,
                    "p99_ms": percentile(waits, 0.99) * 1000,
                    **usage(before, after, self.tasks),
                    "tasks_per_commit": per(stats["enqueued"], stats["commits"]),
                },
                {
                    "threads" if self.threads else "coroutines": callers,
                    "payload_bytes": self.payload_bytes,
                    "tokens": self.tokens,
                },
                session.server,
            )


class _Calls:
    """One caller: its calls, one after the other."""

    def __init__(self, producer: Producer, maker: TaskMaker, count: int) -> None:
        self._producer = producer
        self._maker = maker
        self._count = count
        self.results: list[Enqueued] = []
        self.waits = array("d")
        self.failure: BaseException | None = None

    def run(self, ended: threading.Event) -> None:
        make, enqueue, now = self._maker.make, self._producer.enqueue, time.perf_counter
        try:
            for _ in range(self._count):
                if ended.is_set():
                    return
                task = make()
                called = now()
                self.results.append(enqueue(task))
                self.waits.append(now() - called)
        except BaseException as error:  # noqa: BLE001 - the main thread says it
            self.failure = error
            ended.set()

    async def arun(self) -> None:
        make, enqueue, now = self._maker.make, self._producer.aenqueue, time.perf_counter
        for _ in range(self._count):
            task = make()
            called = now()
            self.results.append(await enqueue(task))
            self.waits.append(now() - called)


def _run_threads(calls: Sequence[_Calls]) -> float:
    ready = threading.Barrier(len(calls) + 1)
    ended = threading.Event()

    def work(each: _Calls) -> None:
        ready.wait()
        each.run(ended)

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in calls]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    ready.wait()
    try:
        for thread in threads:
            thread.join()
    finally:
        ended.set()
    seconds = time.perf_counter() - began
    for each in calls:
        if each.failure is not None:
            raise BenchError(f"an enqueue failed: {each.failure}") from each.failure
    return seconds


async def _run_coroutines(calls: Sequence[_Calls]) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(each.arun() for each in calls))
    return time.perf_counter() - began


__all__ = ["COROUTINES", "THREADS", "Single"]
