"""``batch1``: what a task costs the server where each is claimed and completed alone, beside asynqpg's shape on the same server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fastq import _engine
from fastq._db import Database
from fastq.bench._errors import BenchError
from fastq.bench._handlers import Starts
from fastq.bench._meter import Meter
from fastq.bench._peer import Peer
from fastq.bench._processes import cpu_seconds
from fastq.bench._result import Result, per
from fastq.bench._session import TYPE, Session, named
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._verify import check_completed
from fastq.bench._waiting import STALL, Progress, no_progress, wait_for
from fastq.errors import SettingsError
from fastq.task import Enqueued

#: Tasks at the start of each turn that no figure counts: they fill caches and plans.
_FIRST: Final = 10
#: Statements by which backends are told apart, and how much of their texts says so.
_CLAIMS: Final = ("claim_task", "claim_tasks")
_COMPLETES: Final = ("complete_task", "complete_tasks")
_SHOWN: Final = 150
#: A consumer's that claim and complete.
_SESSIONS: Final = 2


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a task of one turn cost: microseconds of the server's processor, bytes of its log. None: it can't be read here."""

    cpu: float | None
    wal: float | None
    rest: float | None = None
    """Of fastq's third session, which beats and sees to upkeep."""
    per_flush: float | None = None


@dataclass(frozen=True, slots=True)
class Batch1:
    """One task at a time, whose handler sleeps: each claim takes one, each completion is a commit of its own.

    Both sides have ``turns`` turns of ``tasks`` tasks, in turn. Counted is the processor time of the backends that claim and complete:
    asynqpg's one session, two of fastq's three. The third does as much each second whatever there is to do, and is told apart.
    """

    tasks: int = 100
    turns: int = 5
    work_ms: float = 110.0
    """How long a handler sleeps: over 100 ms fastq takes no task ahead."""
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer` and `Consumer` raise."""
        if self.work_ms <= 0:
            raise SettingsError(f"work_ms is {self.work_ms!r}, but must be over 0")
        with (
            Session(dsn) as session,
            Meter(session) as meter,
            Database(named(session.dsn, f"{session.name}_peer"), session.name) as db,
        ):
            maker = TaskMaker(self.payload_bytes)
            ours, theirs = _Ours(self, session, meter, maker), _Theirs(self, session, meter, maker, db)
            pairs: list[tuple[_Turn, _Turn]] = []
            whole = 2 * self.turns * (_FIRST + self.tasks)
            with progress("one at a time", whole, lambda: ours.done + theirs.done):
                for number in range(self.turns):
                    # Each begins as often as the other.
                    first, second = (ours.turn, theirs.turn) if number % 2 else (theirs.turn, ours.turn)
                    one, other = first(), second()
                    pairs.append((one, other) if number % 2 else (other, one))
            ours.check()
            theirs.check()
            costs, peers = [one for one, _ in pairs], [other for _, other in pairs]
            figures = {
                "tasks": self.turns * self.tasks,
                "server_cpu_us": _median([turn.cpu for turn in costs]),
                "peer_cpu_us": _median([turn.cpu for turn in peers]),
                "cpu_of_peer": _median([_ratio(one.cpu, other.cpu) for one, other in pairs]),
                "beat_cpu_us": _median([turn.rest for turn in costs]),
                "wal_bytes": _median([turn.wal for turn in costs]),
                "peer_wal_bytes": _median([turn.wal for turn in peers]),
                "wal_of_peer": _median([_ratio(one.wal, other.wal) for one, other in pairs]),
                "tasks_per_flush": _median([turn.per_flush for turn in costs]),
            }
            settings = {"turns": self.turns, "work_ms": self.work_ms, "payload_bytes": self.payload_bytes}
            return Result("batch1", figures, settings, session.server)


class _Side:
    """One of the two, whose backends' processor time is read between two moments of a turn."""

    def __init__(self, bench: Batch1, session: Session, meter: Meter, maker: TaskMaker, name: str) -> None:
        self._bench = bench
        self._session = session
        self._meter = meter
        self._maker = maker
        self._name = name

    def _backends(self) -> dict[int, tuple[str, float]]:
        """By process: what its session ran last, and the processor time of it so far; none that can't be seen."""
        found = {}
        for pid, query in self._session.db.query("bench_backends", self._name):
            used = cpu_seconds(pid) if self._meter.is_local else None
            if used is not None:
                found[pid] = (query, used)
        return found

    def _between(self, work: Callable[[], object]) -> tuple[dict[str, float], float | None]:
        """Microseconds a task by what sessions ran last, and bytes of the log a task, while ``work`` is done."""
        before, wal = self._backends(), self._meter.read().wal_bytes
        work()
        after, wal_after = self._backends(), self._meter.read().wal_bytes
        used: dict[str, float] = {}
        for pid, (query, seconds) in after.items():
            if pid in before:
                used[query] = used.get(query, 0.0) + (seconds - before[pid][1]) * 1e6 / self._bench.tasks
        return used, None if wal is None or wal_after is None else (wal_after - wal) / self._bench.tasks


class _Ours(_Side):
    def __init__(self, bench: Batch1, session: Session, meter: Meter, maker: TaskMaker) -> None:
        super().__init__(bench, session, meter, maker, session.name)
        self._starts = Starts()
        self._producer = session.producer()
        self._results: list[Enqueued] = []
        queries = _engine.queries()
        self._texts = tuple(_engine.render(queries[name], session.name)[:_SHOWN] for name in (*_CLAIMS, *_COMPLETES))

    @property
    def done(self) -> int:
        return len(self._starts.ids)

    def turn(self) -> _Turn:
        tasks, work = self._bench.tasks, self._bench.work_ms / 1000
        for _ in range(_FIRST + tasks):
            self._results.append(self._producer.enqueue(self._maker.make()))
        consumer = self._session.consumer(self._starts.handler("sync", work), concurrency=1)
        consumer.start()

        def wait(count: int) -> None:
            wait_for("batch1", lambda: consumer.stats()["completed"], count, stall=STALL + 2 * work)

        wait(_FIRST)
        flushes = consumer.stats()["flushes"]
        used, wal = self._between(lambda: wait(_FIRST + tasks))
        flushes = consumer.stats()["flushes"] - flushes
        consumer.stop()
        mine = [us for query, us in used.items() if query.startswith(self._texts)]
        if used and len(mine) != _SESSIONS:
            raise BenchError(f"{len(mine)} sessions claimed or completed, instead of {_SESSIONS}")
        cpu = sum(mine) if used else None
        return _Turn(cpu, wal, sum(used.values()) - sum(mine) if used else None, per(tasks, flushes))

    def check(self) -> None:
        check_completed(self._session.db, [self._results], self._starts)


class _Theirs(_Side):
    def __init__(self, bench: Batch1, session: Session, meter: Meter, maker: TaskMaker, db: Database) -> None:
        super().__init__(bench, session, meter, maker, f"{session.name}_peer")
        self._peer = Peer(db, TYPE)
        self._enqueued = 0
        self.done = 0

    def turn(self) -> _Turn:
        tasks = self._bench.tasks
        self._peer.fill(_FIRST + tasks, _engine.encode_json(self._maker.make().payload))
        self._enqueued += _FIRST + tasks
        self._work(_FIRST)
        used, wal = self._between(lambda: self._work(tasks))
        return _Turn(sum(used.values()) if used else None, wal)

    def _work(self, tasks: int) -> None:
        for _ in range(tasks):
            id_ = self._peer.fetch()
            time.sleep(self._bench.work_ms / 1000)
            self._peer.complete(id_)
            self.done += 1

    def check(self) -> None:
        if (found := self._peer.counts()) != {"completed": self._enqueued}:
            raise BenchError(f"of asynqpg's {self._enqueued} tasks there are {found}")


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


__all__ = ["Batch1"]
