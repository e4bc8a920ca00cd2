"""``foreign``: whether tasks that nobody here handles, and that wait ahead of the consumer's own, slow it down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fastq.bench._handlers import Kind, Starts
from fastq.bench._result import Result
from fastq.bench._session import Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_drained
from fastq.bench._waiting import Progress, no_progress, wait_for
from fastq.bench.enqueue import BATCH
from fastq.consumer import CONCURRENCY
from fastq.task import Enqueued, Task

#: Tasks that are enqueued together.
_RUN: Final = 500
#: As many types have them, in turn.
_TYPES: Final = 5
#: Where they wait: with the consumer's own tasks, or apart. It works for all queues.
_OWN_QUEUE: Final = "default"
_OTHER_QUEUE: Final = "foreign"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Drains of ``tasks`` tasks, in turn in a schema of their own and in one where ``foreign`` others wait, enqueued before.

    They are of types that no consumer handles, and the consumer takes tasks of any queue.
    """

    foreign: int = 500_000
    one_by_one: bool = False
    """They lie in the tables as if each had been enqueued alone; otherwise in runs of 500."""
    same_queue: bool = False
    """They wait in the queue of the consumer's own tasks; otherwise in another one."""
    tasks: int = 500_000
    pairs: int = 3
    handler: Kind = "sync"
    concurrency: int = CONCURRENCY
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        with Session(dsn) as alone, Session(alone.given_dsn) as beside:
            without, among = _Drains(self, alone), _Drains(self, beside)
            with progress("loading others", self.foreign, lambda: among.loaded):
                among.load_foreign()
            rates: list[tuple[float, float]] = []
            with progress("draining", 2 * self.pairs * self.tasks, lambda: without.done + among.done):
                for pair in range(self.pairs):
                    # Each begins as often as the other.
                    if pair % 2:
                        rates.append((without.drain(), among.drain()))
                    else:
                        beside_rate = among.drain()
                        rates.append((without.drain(), beside_rate))
            with progress("checking", None, lambda: 0):
                without.check()
                among.check()
            figures: dict[str, float | None] = {
                "tasks": self.pairs * self.tasks,
                "tasks_per_s": statistics.median(beside_rate for _, beside_rate in rates),
                "alone_per_s": statistics.median(alone_rate for alone_rate, _ in rates),
                "beside_of_alone": statistics.median(beside_rate / alone_rate for alone_rate, beside_rate in rates),
                "least_of_alone": min(beside_rate / alone_rate for alone_rate, beside_rate in rates),
            }
            settings = {
                "foreign": self.foreign,
                "one_by_one": self.one_by_one,
                "same_queue": self.same_queue,
                "pairs": self.pairs,
                "handler": self.handler,
                "concurrency": self.concurrency,
                "payload_bytes": self.payload_bytes,
            }
            return Result("foreign", figures, settings, alone.server)


class _Drains:
    """One schema, and the drains in it."""

    def __init__(self, bench: Foreign, session: Session) -> None:
        self._bench = bench
        self._session = session
        self._maker = TaskMaker(bench.payload_bytes)
        self._starts = Starts()
        self._results: list[Sequence[Enqueued]] = []
        self._others: list[Sequence[Enqueued]] = []
        self.loaded = 0

    @property
    def done(self) -> int:
        """Tasks whose handlers started."""
        return len(self._starts.ids)

    def load_foreign(self) -> None:
        with self._session.producer() as producer:
            self._others.append(producer.enqueue_many(self._foreign(), commit_every=_RUN))
        if self._bench.one_by_one:
            self._session.db.query("bench_split_ready")

    def drain(self) -> float:
        """Tasks a second, from the consumer's start to the answer to its last commit."""
        bench, session = self._bench, self._session
        with session.producer() as producer:
            self._results.append(producer.enqueue_many(self._maker.stream(bench.tasks), commit_every=BATCH))
        consumer = session.consumer(self._starts.handler(bench.handler), concurrency=bench.concurrency)
        began = time.perf_counter()
        consumer.start()
        ended = wait_for("foreign", lambda: consumer.stats()["completed"], bench.tasks)
        consumer.stop()
        return bench.tasks / (ended - began)

    def check(self) -> None:
        check_drained(self._session.db, self._results, self._starts, waiting=self._others)

    def _foreign(self) -> Iterator[Task]:
        queue = _OWN_QUEUE if self._bench.same_queue else _OTHER_QUEUE
        # A run is of one type, so that it is one chunk.
        for task in self._maker.stream(self._bench.foreign):
            type_ = f"bench:foreign-{self.loaded // _RUN % _TYPES}"
            self.loaded += 1
            yield Task(type_, task.payload, queue=queue)


__all__ = ["Foreign"]
