"""``retention``: whether the tables level off under a steady load, and what emptying them costs those who enqueue and claim meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from fastq._engine import TaskInfo
from fastq.bench._errors import BenchError
from fastq.bench._handlers import Starts
from fastq.bench._meter import Meter, usage
from fastq.bench._result import Result, percentile
from fastq.bench._session import TYPE, Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_started
from fastq.bench._waiting import STALL, Progress, no_progress, wait_for
from fastq.bench._watch import RetentionWatch
from fastq.consumer import CONCURRENCY, Consumer
from fastq.errors import SettingsError
from fastq.producer import Producer
from fastq.task import Enqueued, Task

#: Tasks that wait all the time, for a consumer or for their time, and tasks that run all the time.
_WAITING: Final = 1_000
_DELAYED: Final = 200
_RUNNING: Final = 4
#: Seconds between two commits of the load, and between one probe's start and the next one's enqueue.
_BATCH_S: Final = 0.05
_PROBE_S: Final = 0.02
#: How many looks at the tables' sizes there are.
_LOOKS: Final = 20

_PROBE: Final = f"{TYPE}:probe"
_HELD: Final = f"{TYPE}:held"
_LONG: Final = f"{TYPE}:long"


@dataclass(frozen=True, slots=True)
class Retention:
    """``rate`` tasks a second for ``seconds``, kept for ``keep`` seconds; beside them tasks that wait or run all the time, and probes.

    A probe is one task at a time: how long its enqueue takes, and how long it is from there to the first line of its handler, of which its
    claim is a part.
    """

    rate: int = 2_000
    """Tasks a second."""
    keep: float = 120.0
    """Seconds that completed tasks are kept."""
    seconds: float = 600.0
    archive: bool = False
    """What is removed goes into the archive first."""
    concurrency: int = CONCURRENCY
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        if self.concurrency <= _RUNNING:
            raise SettingsError(
                f"concurrency is {self.concurrency}, but must be over {_RUNNING}, which run all the time"
            )
        with Session(dsn) as session, Meter(session) as meter:
            load = Load(self, session)
            load.hold()
            with load.working(), RetentionWatch(session, self.seconds / _LOOKS) as watch, meter.watching():
                began = time.perf_counter()
                before = meter.read()
                with progress("running", round(self.seconds), lambda: time.perf_counter() - began):
                    probes = load.probe(began + self.seconds)
                after = meter.read()
                seconds = time.perf_counter() - began
                watch.check()
            tasks = load.completed
            with progress("checking", None, lambda: 0):
                load.finish()
            figures = {
                "tasks": tasks,
                "seconds": seconds,
                "tasks_per_s": tasks / seconds,
                "leaves_emptied": watch.emptied,
                **_times("start", [(p.called, p.started) for p in probes], watch),
                **_times("answer", [(p.called, p.answered) for p in probes], watch),
                "last_over_middle": _levelling(watch.sizes, self.keep),
                "kept_mb_most": max(map(_kept, watch.sizes)),
                "payloads_lost": 0,
                **usage(before, after, tasks),
            }
            settings = {
                "rate": self.rate,
                "keep": self.keep,
                "seconds": self.seconds,
                "archive": self.archive,
                "concurrency": self.concurrency,
                "payload_bytes": self.payload_bytes,
                "waiting": _WAITING,
                "delayed": _DELAYED,
                "running": _RUNNING,
            }
            return Result(
                "retention", figures, settings, session.server, self._notes(tasks / seconds), tuple(watch.sizes)
            )

    def _notes(self, rate: float) -> tuple[str, ...]:
        notes = []
        if rate < 0.97 * self.rate:
            notes.append(f"{rate:,.0f} tasks a second were done, not {self.rate:,}: the machine was too slow")
        if self.seconds < 3 * self.keep:
            notes.append("whether tables level off shows after three times the time that is kept (--seconds, --keep)")
        return tuple(notes)


@dataclass(slots=True)
class _Probe:
    called: float
    answered: float
    started: float


@dataclass(slots=True)
class Load:
    """What is at work: the producer, the consumer, and what waits and runs all the time."""

    bench: Retention
    session: Session
    producer: Producer = field(init=False)
    consumer: Consumer = field(init=False)
    starts: Starts = field(default_factory=Starts)
    results: list[Sequence[Enqueued]] = field(default_factory=list)
    held: dict[int, object] = field(default_factory=dict)
    """Of tasks that wait or run all the time: their payloads."""
    lost: list[int] = field(default_factory=list)
    """Tasks that came with another payload."""
    released: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    started: queue.SimpleQueue[tuple[int, float]] = field(default_factory=queue.SimpleQueue)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.producer = self.session.producer()
        self.consumer = self._consumer()
        self.consumer.add_handler(TYPE, self._checked(TaskMaker(self.bench.payload_bytes)))
        self.consumer.add_handler(_PROBE, self._note_probe)
        self.consumer.add_handler(_LONG, self._run_long, workers=_RUNNING)

    def _consumer(self) -> Consumer:
        bench = self.bench
        consumer = Consumer(
            self.session.dsn,
            schema=self.session.name,
            concurrency=bench.concurrency,
            completed_retention=bench.keep,
            archive=bench.archive,
        )
        self.session.stop_at_end(consumer)
        return consumer

    @property
    def completed(self) -> int:
        """Tasks of the load whose completion is stored, and probes."""
        return int(self.consumer.stats()["completed"])

    # --- the tasks ---------------------------------------------------------------------------------

    def hold(self) -> None:
        """Enqueue what waits and runs all the time, so that it lies in the first leaf."""
        for type_, count, delay in (
            (_HELD, _WAITING, None),
            (_HELD, _DELAYED, self.bench.seconds),
            (_LONG, _RUNNING, None),
        ):
            payloads = [{"n": n, "text": f"{type_} {delay} {n} " * 3} for n in range(count)]
            found = self.producer.enqueue_many(Task(type_, payload, delay=delay) for payload in payloads)
            self.held.update(zip((one.id for one in found), payloads, strict=True))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within: the load comes and is worked off."""
        self.consumer.start()
        thread = threading.Thread(target=self._produce, name="fastq-bench-producer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            self.released.set()
            thread.join()

    def _produce(self) -> None:
        maker = TaskMaker(self.bench.payload_bytes)
        began = time.perf_counter()
        made = 0
        try:
            while not self.over.is_set():
                due = int((time.perf_counter() - began) * self.bench.rate) - made
                if due > 0:
                    self.results.append(self.producer.enqueue_many(maker.stream(due)))
                    made += due
                self.over.wait(_BATCH_S)
        except BaseException as error:  # noqa: BLE001 - the main thread says it
            self.failure = error

    def probe(self, until: float) -> list[_Probe]:
        """One task after the other until that time. Raises BenchError: one did not start, or the producer failed."""
        probes: list[_Probe] = []
        while time.perf_counter() < until:
            if self.failure is not None:
                raise BenchError(f"the producer failed: {self.failure}") from self.failure
            called = time.perf_counter()
            result = self.producer.enqueue(Task(_PROBE, len(probes)))
            answered = time.perf_counter()
            self.results.append([result])
            try:
                id_, started = self.started.get(timeout=STALL)
            except queue.Empty:
                raise BenchError(f"task {result.id} did not start within {STALL:g} s") from None
            if id_ != result.id:
                raise BenchError(f"task {id_} started instead of {result.id}")
            probes.append(_Probe(called, answered, started))
            time.sleep(_PROBE_S)
        return probes

    # --- the handlers ------------------------------------------------------------------------------

    def _checked(self, maker: TaskMaker) -> Any:
        text = maker.make().payload["text"]
        note = self.starts.ids.append

        def run(task: TaskInfo) -> None:
            note(task.id)
            payload = task.payload
            if not isinstance(payload, dict) or payload.get("text") != text:
                self.lost.append(task.id)

        return run

    def _note_probe(self, task: TaskInfo) -> None:
        at = time.perf_counter()
        self.starts.ids.append(task.id)
        self.started.put((task.id, at))

    def _run_long(self, task: TaskInfo) -> None:
        self.released.wait()
        self._check_held(task)

    def _check_held(self, task: TaskInfo) -> None:
        # Looked at now: the payload came with the claim, or has moved from leaf to leaf meanwhile.
        if self.held.pop(task.id, None) != task.payload:
            self.lost.append(task.id)

    # --- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Work off what waited, and check all. Raises BenchError."""
        if self.failure is not None:
            raise BenchError(f"the producer failed: {self.failure}") from self.failure
        total = sum(map(len, self.results)) + _RUNNING
        wait_for("the rest", lambda: self.completed, total)
        self.consumer.stop()
        last = self._consumer()
        last.add_handler(_HELD, self._check_held)
        last.start()
        wait_for("what waited", lambda: last.stats()["completed"], _WAITING + _DELAYED)
        last.stop()
        check_started(self.results, self.starts)
        refused = self.consumer.stats()["refused"] + last.stats()["refused"]
        if self.lost or self.held or refused:
            raise BenchError(
                f"{len(self.lost):,} tasks came without their payload, {len(self.held):,} that waited or ran never ended, "
                f"{refused:,.0f} results were refused"
            )
        self._check_archive(total + _WAITING + _DELAYED)

    def _check_archive(self, total: int) -> None:
        [(rows, ids, completed)] = self.session.db.query("bench_archive")
        if rows != ids or (self.bench.archive and ids + completed != total) or (not self.bench.archive and rows):
            raise BenchError(
                f"of {total:,} tasks completed {completed:,} are kept, and {rows:,} with {ids:,} ids are in the archive"
            )


def _times(what: str, probes: list[tuple[float, float]], watch: RetentionWatch) -> dict[str, float | None]:
    """How long probes took, and those during which a leaf was emptied, in milliseconds."""
    found: dict[str, float | None] = {}
    for name, chosen in (("", probes), ("_emptying", [p for p in probes if watch.is_emptying(*p)])):
        took = sorted((ended - began) * 1000 for began, ended in chosen)
        found[f"{what}{name}_probes"] = len(took)
        for figure, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
            found[f"{what}{name}_{figure}_ms"] = percentile(took, share) if took else None
    return found


def _kept(sizes: dict[str, float]) -> float:
    """Megabytes of all but the archive, which only grows."""
    return sizes["contents_mb"] + sizes["completions_mb"] + sizes["others_mb"]


def _levelling(sizes: Sequence[dict[str, float]], keep: float) -> float | None:
    """Megabytes in the last third of the time, by those of the third before it; None: it was too short for tables to level off."""
    if sizes[-1]["at_s"] < 3 * keep * 0.9:
        return None
    third = len(sizes) // 3
    middle, last = (list(map(_kept, part)) for part in (sizes[-2 * third : -third], sizes[-third:]))
    return (sum(last) / len(last)) / (sum(middle) / len(middle))


__all__ = ["Load", "Retention"]
