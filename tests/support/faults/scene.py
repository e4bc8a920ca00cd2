"""A server of a test's own with workers and producers on it, all at their defaults, and the account of every task at the end."""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, LiteralString, Self

import psycopg

from fastq import ConnectionLost, DatabaseError, Producer, Task
from fastq.migrations import migrate
from tests.support.faults.journal import Journal
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.server import PrivateServer
from tests.support.waiting import wait_until

SCHEMA = "fastq"
_COMMITTED = re.compile(r"(\d+) tasks of the call are in and stay")
#: What a worker logs of a living worker's loss of tasks, its own or another's.
_LOSSES = ("was declared dead", "is dead: silent", "rescued ")


def repeats(default: int = 20) -> int:
    """How often a race is tried: ``FASTQ_FAULT_REPEATS``."""
    return int(os.environ.get("FASTQ_FAULT_REPEATS", default))


def pass_time(seconds: float) -> None:
    """Lets a fault last: what it does not do in that time is what is tested."""
    over = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= over, timeout=seconds + 10)


@dataclass
class Promises:
    """What producers were told of their tasks, by the number in each task's payload."""

    acknowledged: dict[int, int] = field(default_factory=dict)
    """Number to id, of calls that returned."""
    committed: set[int] = field(default_factory=set)
    """Numbers of tasks that a failed call's error said are in."""
    doubtful: list[list[int]] = field(default_factory=list)
    """Transactions of which nobody knows: each is there whole or not at all."""
    refused: set[int] = field(default_factory=set)
    """Numbers of tasks that an error said are not in."""
    errors: list[str] = field(default_factory=list)
    """Messages of all failed calls."""
    at_once: int = 0
    """How many tasks there may be, at most, in calls that are under way."""

    @property
    def count(self) -> int:
        """How many tasks must be there."""
        return len(self.acknowledged) + len(self.committed)


class Load:
    """Threads that enqueue without end, one by one and in bulk, and note what they were told. Leaving the block ends it.

    Args:
        dsn: through which they enqueue.
        singles: threads that call `enqueue`.
        bulks: threads that call `enqueue_many`, in one transaction or with ``commit_every``, in turn.
        bulk_tasks: tasks in such a call, at most.
        pause: seconds between two calls of a thread.
        payload: of each task, beside its number.
    """

    def __init__(
        self,
        dsn: str,
        *,
        singles: int = 4,
        bulks: int = 2,
        bulk_tasks: int = 300,
        pause: float = 0.02,
        payload: dict[str, Any] | None = None,
    ) -> None:
        self.promises = Promises(at_once=singles + bulks * bulk_tasks)
        self._producer = Producer(dsn, schema=SCHEMA)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._bulk_tasks = bulk_tasks
        self._pause = pause
        self._payload = payload or {}
        self._deaths: list[BaseException] = []
        self.calls = 0
        """How many calls returned what was asked of them."""
        loops = [self._enqueue_singly] * singles + [self._enqueue_bulks] * bulks
        self._threads = [threading.Thread(target=self._run, args=(loop,), daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def wait_for_calls(self, more: int = 20, *, timeout: float = 60.0) -> None:
        """Waits until so many more calls have returned."""
        target = self.calls + more
        wait_until(lambda: self._deaths or self.calls >= target, timeout=timeout, message=f"{more} more calls")
        self._check()

    @property
    def reconnects(self) -> int:
        """Connections that its producer lost."""
        return int(self._producer.stats()["reconnects"])

    def stop(self) -> Promises:
        """Ends it once all calls under way have returned."""
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a call did not come back"
        self._producer.close()
        self._check()
        return self.promises

    def _check(self) -> None:
        if self._deaths:
            raise self._deaths[0]

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                loop()
                self._stop.wait(self._pause)
        except BaseException as error:  # noqa: BLE001 - raised where the load is waited for
            self._deaths.append(error)

    def _task(self, number: int) -> Task:
        # Some wait for a time: leaders have to promote them, whatever goes wrong.
        return Task("t", self._payload | {"n": number}, delay=0.5 if number % 10 == 0 else None)

    def _enqueue_singly(self) -> None:
        number = next(self._numbers)
        try:
            id_ = self._producer.enqueue(self._task(number)).id
        except DatabaseError as error:
            self._note([number], None, error)
        else:
            with self._lock:
                self.promises.acknowledged[number] = id_
                self.calls += 1

    def _enqueue_bulks(self) -> None:
        size = random.randint(2, self._bulk_tasks)
        every = random.choice([None, max(1, size // 5)])
        with self._lock:
            numbers = [next(self._numbers) for _ in range(size)]
        try:
            answers = self._producer.enqueue_many(map(self._task, numbers), commit_every=every)
        except DatabaseError as error:
            self._note(numbers, every, error)
        else:
            with self._lock:
                self.promises.acknowledged.update((n, a.id) for n, a in zip(numbers, answers, strict=True))
                self.calls += 1

    def _note(self, numbers: list[int], every: int | None, error: DatabaseError) -> None:
        """What a failed call says of its tasks."""
        said = _COMMITTED.search(str(error))
        sure = int(said[1]) if said else 0
        is_in_doubt = isinstance(error, ConnectionLost) and error.in_doubt
        doubtful = numbers[sure:][: every or len(numbers)] if is_in_doubt else []
        with self._lock:
            self.promises.errors.append(str(error))
            self.promises.committed.update(numbers[:sure])
            if doubtful:
                self.promises.doubtful.append(doubtful)
            self.promises.refused.update(numbers[sure + len(doubtful) :])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if kind is None:
            self.stop()
        else:
            # What failed says more than the calls that it keeps from ending.
            threading.Thread(target=self._producer.close, daemon=True).start()


class Scene:
    """A private server with a migrated schema. All that is made here ends with it; the server is its caller's.

    Args:
        server: migrated here.
        folder: for the journal and the workers' logs.
    """

    def __init__(self, server: PrivateServer, folder: Path) -> None:
        self.server = server
        self._folder = folder
        self._stack = ExitStack()
        self.workers: list[WorkerProcess] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / "journal")
        migrate(server.dsn, schema=SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    # --- who works ---------------------------------------------------------------------------------

    def worker(self, dsn: str | None = None, **settings: Any) -> WorkerProcess:
        """Another worker process for type ``t``, at its defaults; returns once it is registered."""
        before = self.value("SELECT count(*) FROM consumer")
        settings = {"dsn": dsn or self.server.dsn, "schema": SCHEMA, **settings}
        log = self._folder / f"worker-{len(self.workers) + 1}.log"
        worker = self._stack.enter_context(WorkerProcess(self.journal, log, settings))
        self.workers.append(worker)
        wait_until(
            lambda: self.value("SELECT count(*) FROM consumer") > before, timeout=30, message="a worker's registration"
        )
        return worker

    def complaints(self, worker: WorkerProcess) -> list[str]:
        """What a worker logged as warnings and errors."""
        return [line for line in worker.log.splitlines() if line.startswith(("WARNING", "ERROR", "CRITICAL"))]

    def wait_for_complaint(self, pattern: str, *, timeout: float = 30.0) -> None:
        """Waits until each worker has logged a warning or an error that matches."""

        def complained(worker: WorkerProcess) -> bool:
            complaints = self.complaints(worker)
            assert any(re.search(pattern, line) for line in complaints), complaints
            return True

        for worker in self.workers:
            wait_until(
                lambda worker=worker: complained(worker),  # type: ignore[misc]
                timeout=timeout,
                message=f"a complaint that matches {pattern!r}",
            )

    # --- SQL ---------------------------------------------------------------------------------------

    @contextmanager
    def db(self) -> Iterator[psycopg.Connection]:
        """A connection of its own past all proxies, which looks names up in the schema."""
        with psycopg.connect(self.server.dsn, autocommit=True, connect_timeout=10) as db:
            db.execute("SELECT set_config('search_path', %s, false), set_config('jit', 'off', false)", [SCHEMA])
            yield db

    def all(self, query: LiteralString, *params: Any) -> list[tuple[Any, ...]]:
        """All rows of a statement."""
        with self.db() as db:
            return db.execute(query, params or None).fetchall()

    def value(self, query: LiteralString, *params: Any) -> Any:
        """The only value of a statement."""
        [(value,)] = self.all(query, *params)
        return value

    def execute(self, query: LiteralString, *params: Any) -> None:
        """A statement without an answer."""
        with self.db() as db:
            db.execute(query, params or None)

    # --- what became of tasks ----------------------------------------------------------------------

    def wait_until_drained(self, *, timeout: float = 60.0) -> None:
        """Waits until nothing waits or runs."""

        def left() -> int:
            left: int = self.value(
                "SELECT (SELECT coalesce(sum(hi - lo + 1), 0) FROM ready) + (SELECT count(*) FROM claim) + (SELECT count(*) FROM delayed)"
            )
            return left

        wait_until(lambda: left() == 0, timeout=timeout, message="the end of all tasks")

    def states(self) -> Counter[str]:
        """How many tasks are in each state."""
        return Counter(dict(self.all("SELECT state, count(*) FROM tasks GROUP BY state")))

    def check_enqueued(self, *all_promises: Promises) -> dict[int, int]:
        """Every task that was promised is there once, none is there twice, and none that was refused. Gives ids by number.

        The numbers of several loads must not meet.
        """
        rows = self.all("SELECT id, (payload::json ->> 'n')::bigint FROM tasks")
        ids: dict[int, int] = {number: id_ for id_, number in rows}
        assert len({id_ for id_, _ in rows}) == len(rows), "an id is there twice"
        assert len(ids) == len(rows), "a task is there twice"
        for promises in all_promises:
            wrong = {n: id_ for n, id_ in promises.acknowledged.items() if ids.get(n) != id_}
            assert not wrong, f"{len(wrong)} acknowledged tasks are lost: {list(wrong.items())[:5]}"
            assert promises.committed <= ids.keys(), "committed tasks are lost"
            assert not promises.refused & ids.keys(), "refused tasks are there"
            for group in promises.doubtful:
                assert len({n in ids for n in group}) == 1, "a transaction is there in part"
        return ids

    def check_worked(self, *all_promises: Promises, may_repeat: bool = False) -> None:
        """All that was promised has completed, and no living worker lost anything: no attempt is charged but each task's one.

        Args:
            *all_promises: as for `check_enqueued`.
            may_repeat: a crash took claims with it, so a run may be there twice, its first result refused; and what had not been
                acknowledged may have run and be gone.
        """
        ids = self.check_enqueued(*all_promises)
        assert self.states() == {"completed": len(ids)}
        assert self.all("SELECT id, error FROM attempt_error") == []
        assert self.all("SELECT pid FROM consumer WHERE dead_at IS NOT NULL") == []
        for worker in self.workers:
            lost = [line for line in worker.log.splitlines() if any(loss in line for loss in _LOSSES)]
            assert lost == []
        starts = Counter(self.journal.started())
        assert starts.keys() >= set(ids.values()), "a completion without a run"
        # What was enqueued at the moment of a crash may have been seen by a worker before it was durable (ADR 2; and a server whose
        # postmaster is gone waits for no standby): such a run is one of a task that nobody was told is in. Its call went on with other
        # ids, or failed. One crash, so no more of them than were under way at once.
        most = sum(each.at_once for each in all_promises) if may_repeat else 0
        gone = starts.keys() - set(ids.values())
        assert len(gone) <= most, f"runs of {len(gone)} tasks that are not there: {sorted(gone)[:5]}"
        if not may_repeat:
            assert [id_ for id_, count in starts.items() if count > 1] == []
            assert [line for worker in self.workers for line in self.complaints(worker) if "refused" in line] == []
