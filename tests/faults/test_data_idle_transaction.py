"""A transaction that has enqueued and then stands open: others go on as if it weren't there, and its tasks start when it commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeAlias

import psycopg
import pytest

from fastq import Producer, Task, TaskInfo
from fastq.bench._load import Load
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker
from fastq.consumer import Consumer
from tests.support.faults.needs import need_room
from tests.support.faults.scene import pass_time
from tests.support.faults.server import PrivateServer
from tests.support.producing import Background
from tests.support.waiting import wait_until

#: How many tasks the transaction has written before it stands still: more than a stream keeps back.
_LATE = 20_000
#: GiB of tables and logs of both servers, which share the machine: at 150,000 tasks a second together.
_NEEDED = 25
_Opened: TypeAlias = Callable[[Session, "_Late"], AbstractContextManager[None]]


@dataclass
class _Late:
    """The tasks of the transaction."""

    ids: set[int] = field(default_factory=set)
    committed: float = 0.0
    """When it was told that its COMMIT is done."""
    started: dict[int, float] = field(default_factory=dict)
    """When each of them did."""

    def note(self, task: TaskInfo) -> None:
        """One starts."""
        self.started[task.id] = time.perf_counter()


@pytest.fixture
def servers() -> Iterator[tuple[PrivateServer, PrivateServer]]:
    """One with such a transaction, and one without to compare it with: what disk and machine do meanwhile, they do to both."""
    with PrivateServer() as held, PrivateServer() as free:
        yield held, free


@contextmanager
def _by_a_generator(session: Session, late: _Late) -> Iterator[None]:
    """An `enqueue_many` whose iterable stops in the middle."""
    go_on = threading.Event()

    def made() -> Iterator[Task]:
        yield from (Task("late") for _ in range(_LATE))
        assert go_on.wait(900)

    with Producer(session.dsn, schema=session.name, iterable_timeout=900) as producer:
        call = Background(lambda: (producer.enqueue_many(made()), time.perf_counter()))
        try:
            _wait_until_open(session)
            yield
        finally:
            go_on.set()
        answers, late.committed = call.result()
        late.ids.update(answer.id for answer in answers)


@contextmanager
def _by_plain_sql(session: Session, late: _Late) -> Iterator[None]:
    """What a user's own transaction writes: tasks and their chunks, with ids of the sequence."""
    with psycopg.connect(session.dsn) as user:
        user.execute("SELECT set_config('search_path', %s, false)", [session.name])
        lane = user.execute("INSERT INTO lane (queue, type) VALUES ('default', 'late') RETURNING id").fetchone()
        user.commit()
        assert lane is not None
        for _ in range(_LATE // 500):
            row = user.execute("SELECT nextval('task_id'), (SELECT no FROM leaf WHERE state = 'open')").fetchone()
            assert row is not None
            lo, leaf = row
            user.execute(
                "INSERT INTO task (id, lane, leaf, max_attempts, format, payload) "
                "SELECT %s + i, %s, %s, 25, 'j', 'null' FROM generate_series(0, 499) i",
                [lo, lane[0], leaf],
            )
            user.execute(
                "INSERT INTO ready (lo, hi, lane, leaf, max_attempts, task_bytes) VALUES (%s, %s, %s, %s, 25, 4)",
                [lo, lo + 499, lane[0], leaf],
            )
            late.ids.update(range(lo, lo + 500))
        yield
        user.commit()
        late.committed = time.perf_counter()


def _wait_until_open(session: Session) -> None:
    # The load's own transactions are short.
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND backend_xid IS NOT NULL "
        "AND state_change < clock_timestamp() - interval '0.5 s'"
    )
    with psycopg.connect(session.dsn, autocommit=True) as db:
        wait_until(lambda: db.execute(query).fetchone() == (1,), message="a transaction that has written and stands")


@pytest.mark.parametrize("opened", [_by_plain_sql, _by_a_generator])
def test_an_idle_transaction_that_has_enqueued_stops_nobody(
    servers: tuple[PrivateServer, PrivateServer], opened: _Opened
) -> None:
    # Seconds, not minutes: what a claim that walks over its rows would cost shows, a twentieth does not.
    # Producers wait for room: in so short a time, what waited before counts. Others may have the machine for one of its seconds.
    rates = (_rates_beside(*servers, opened, seconds=3) for _ in range(2))
    assert any(completed >= 0.6 and enqueued >= 0.4 for completed, enqueued in rates)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("opened", [_by_plain_sql, _by_a_generator])
def test_five_idle_minutes_cost_others_a_twentieth_at_most(
    servers: tuple[PrivateServer, PrivateServer], opened: _Opened
) -> None:
    need_room(servers[0].data_dir, _NEEDED, "what two servers work off in seven minutes")
    completed, enqueued = _rates_beside(*servers, opened, seconds=300)
    assert completed >= 0.95
    assert enqueued >= 0.95


class _Work:
    """A producer and a consumer at full speed, and a second consumer for the tasks that come late."""

    def __init__(self, server: PrivateServer) -> None:
        self._stack = ExitStack()
        self._server = server
        self.late = _Late()

    def __enter__(self) -> Self:
        self.session = self._stack.enter_context(Session(self._server.dsn))
        self.load = self._stack.enter_context(
            Load(self.session, TaskMaker(), batch=1_000, handler="sync", concurrency=32)
        )
        late = Consumer(self.session.dsn, schema=self.session.name)
        late.add_handler("late", self.late.note)
        late.start()
        self.session.stop_at_end(late)
        self._over = threading.Event()
        self._watch = Background(self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        with self._stack:
            self._watch.result()

    def rates(self, since: float, until: float) -> tuple[float, float]:
        """Tasks completed and tasks enqueued a second, between these times."""
        looks = self.load.looks
        seen = zip(looks.times, looks.completed, looks.backlogs, strict=False)
        inside = [(at, completed, completed + backlog) for at, completed, backlog in seen if since <= at <= until]
        if len(inside) < 2:
            return 0.0, 0.0  # too short for what this machine does meanwhile
        first, last = inside[0], inside[-1]
        seconds = last[0] - first[0]
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds

    def _look(self) -> None:
        while not self._over.is_set():
            self.load.watch(time.perf_counter() + 0.2)


def _rates_beside(
    with_it: PrivateServer, without: PrivateServer, opened: _Opened, *, seconds: float
) -> tuple[float, float]:
    """What such a transaction leaves of a server's rates, of completions and of enqueues: that of one with it over that of one without,
    by what it was before and after."""
    with _Work(with_it) as one, _Work(without) as other:
        beside = min(60.0, max(2.5, seconds / 2))
        pass_time(3)
        began = time.perf_counter()
        pass_time(beside)
        with opened(one.session, one.late):
            held = time.perf_counter()
            pass_time(seconds)
            released = time.perf_counter()
            assert one.late.started == {}, "a task started before it was committed"
        committed = one.late.committed
        pass_time(beside)
        ended = time.perf_counter()
        wait_until(lambda: len(one.late.started) == _LATE)
        assert one.late.started.keys() == one.late.ids
        starts = one.late.started.values()
        # Nothing else waits in their lane. Where other tests have the machine, too, they may be later.
        assert max(starts) - committed <= (2 if seconds > 60 else 10)

        def compared(since: float, until: float) -> list[float]:
            return [mine / its for mine, its in zip(one.rates(since, until), other.rates(since, until), strict=True)]

        before, beside_it, after = compared(began, held), compared(held, released), compared(committed, ended)
        completed, enqueued = (
            2 * then / (earlier + later) for earlier, then, later in zip(before, beside_it, after, strict=True)
        )
        step = max(1.0, seconds / 10)
        steps = [began + n * step for n in range(int((ended - began) / step))]
        rates = [tuple(tuple(map(round, each.rates(at, at + step))) for each in (one, other)) for at in steps]
        print(  # noqa: T201
            f"{completed:.3f} of its completions beside it, {enqueued:.3f} of its enqueues; tasks/s completed and enqueued, "
            f"with and without, each {step:g} s: {rates}"
        )
        return completed, enqueued
