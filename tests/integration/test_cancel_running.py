"""Cancelling a task that runs, or is claimed to be run soon, reaches its handler."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from fastq import Consumer, Producer, Task, TaskCancelled, TaskInfo, testing
from fastq.cli import main
from fastq.client import Client
from tests.support.consuming import new_consumer, states, wait_for_states
from tests.support.waiting import wait_until

Make = Callable[..., Consumer]
#: Told by a notification, or left to look by itself.
ways = pytest.mark.parametrize("listen", [True, False], ids=["told", "looks"])


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as found:
        # Connected, and its rights looked at: what is measured is the way of a cancel.
        assert found.cancel_tasks(ids=[]) == 0
        yield found


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as found:
        yield found


class Hooked:
    """An error hook that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def __call__(self, task: TaskInfo, error: BaseException, *, is_final: bool) -> None:
        self.told.append(error)


@pytest.fixture
def hook() -> Hooked:
    return Hooked()


@pytest.fixture
def make(dsn: str, migrated: str, hook: Hooked) -> Iterator[Make]:
    """Makes consumers, and stops them at the end."""
    with ExitStack() as stack:

        def made(**settings: Any) -> Consumer:
            consumer = new_consumer(dsn, migrated, error_hook=hook, **settings)

            def stop() -> None:
                if consumer._running is not None:
                    consumer.stop(5)

            stack.callback(stop)
            return consumer

        yield made


class Sleeper:
    """An async handler that sleeps until it is cancelled, and then does ``then``."""

    def __init__(self, then: Callable[[TaskInfo], None] | None = None) -> None:
        self.started: dict[int, float] = {}
        self.cancelled: dict[int, float] = {}
        self._then = then

    async def __call__(self, task: TaskInfo) -> None:
        self.started[task.id] = time.monotonic()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled[task.id] = time.monotonic()
            assert task.is_cancelled()
            if self._then is None:
                raise
            self._then(task)


class Looker:
    """A sync handler that looks whether it is cancelled, and then does ``then``; or ends, unless ``release`` comes first."""

    def __init__(self, then: Callable[[TaskInfo], None] | None = None) -> None:
        self.started: dict[int, float] = {}
        self.cancelled: dict[int, float] = {}
        self.release = threading.Event()
        self.ended: list[int] = []
        self._then = then

    def __call__(self, task: TaskInfo) -> None:
        assert not task.is_cancelled()
        task.raise_if_cancelled()
        self.started[task.id] = time.monotonic()
        wait_until(lambda: task.is_cancelled() or self.release.is_set(), timeout=60)
        if task.is_cancelled():
            self.cancelled[task.id] = time.monotonic()
            (self._then or TaskInfo.raise_if_cancelled)(task)
        self.ended.append(task.id)


def fail(task: TaskInfo) -> None:
    raise ValueError("while it ended")


def end(task: TaskInfo) -> None:
    """It has succeeded, too late."""


Handler = Sleeper | Looker
handlers = pytest.mark.parametrize("handler_type", [Sleeper, Looker], ids=["async", "sync"])


def start(make: Make, handler: Handler, *, type: str = "t", timeout: float | None = None, **settings: Any) -> Consumer:  # noqa: A002
    consumer = make(**settings)
    consumer.add_handler(type, handler, timeout=timeout)
    consumer.start()
    return consumer


def errors(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT count(*) FROM attempt_error").fetchall()
    return int(count)


def free(consumer: Consumer) -> None:
    """Waits until no handler runs, and nothing is left of what was claimed."""
    running = consumer._running
    assert running is not None
    wait_until(lambda: running.engine.running == 0)


# --- it reaches the handler ----------------------------------------------------------------------


@ways
@handlers
def test_a_cancel_reaches_a_running_handler(
    producer: Producer,
    make: Make,
    client: Client,
    db: psycopg.Connection,
    hook: Hooked,
    caplog: pytest.LogCaptureFixture,
    handler_type: type[Handler],
    listen: bool,
) -> None:
    handler = handler_type()
    with caplog.at_level(logging.INFO, logger="fastq"):
        consumer = start(make, handler, listen=listen)
        other = producer.enqueue(Task("t")).id
        # Poll-only: looked for each 1 to 1.5 s. Of three, the best: the machine is others', too.
        took: dict[int, float] = {}
        while len(took) < 3 and min(took.values(), default=60) >= (1.0 if listen else 2.0):
            id_ = producer.enqueue(Task("t")).id
            wait_until(lambda: {id_, other} <= set(handler.started))  # noqa: B023 within this round
            assert client.cancel_task(id_).state == "cancelled"
            counted_at = time.monotonic()
            wait_until(lambda: id_ in handler.cancelled)  # noqa: B023 within this round
            took[id_] = handler.cancelled[id_] - counted_at
        assert min(took.values()) < (1.0 if listen else 2.0)
        wait_until(lambda: consumer.stats()["cancelled"] == len(took))
        wait_until(lambda: "1 tasks were cancelled" in caplog.text)
    assert list(handler.cancelled) == list(took)
    # The other runs on.
    client.cancel_task(other)
    wait_until(lambda: other in handler.cancelled)
    free(consumer)
    # No failure, no attempt stored, nobody told; and what obeyed is no refused result.
    stats = consumer.stats()
    assert (stats["refused"], stats["failed"], stats["retried"], stats["completed"]) == (0, 0, 0, 0)
    assert not hook.told
    assert (errors(db), states(db)) == (0, {"cancelled": len(took) + 1})
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    consumer.stop()
    assert not db.execute("SELECT FROM claim").fetchall()


@handlers
def test_what_a_cancelled_handler_raises_is_no_failure(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection, hook: Hooked, handler_type: type[Handler]
) -> None:
    handler = handler_type(fail)
    consumer = start(make, handler)
    id_ = producer.enqueue(Task("t")).id
    wait_until(lambda: id_ in handler.started)
    client.cancel_task(id_)
    wait_until(lambda: id_ in handler.cancelled)
    free(consumer)
    assert not hook.told
    assert (errors(db), states(db)) == (0, {"cancelled": 1})
    assert consumer.stats()["refused"] == 0


@handlers
def test_a_late_success_is_refused_and_counted(
    producer: Producer,
    make: Make,
    client: Client,
    db: psycopg.Connection,
    dsn: str,
    migrated: str,
    handler_type: type[Handler],
) -> None:
    handler = handler_type(end)
    consumer = start(make, handler, heartbeat_interval=0.2)
    id_ = producer.enqueue(Task("t")).id
    wait_until(lambda: id_ in handler.started)
    client.cancel_task(id_)
    wait_until(lambda: consumer.stats()["refused"] == 1)
    assert (consumer.stats()["completed"], states(db)) == (0, {"cancelled": 1})
    wait_until(lambda: db.execute("SELECT FROM consumer WHERE refused = 1").fetchall())
    told = CliRunner().invoke(main, ["doctor", "--dsn", dsn, "--schema", migrated])
    [line] = [line for line in told.stdout.splitlines() if "refused:" in line]
    assert "1 result of process" in line
    assert "were cancelled" in line


def test_a_cancelled_coroutine_keeps_its_place_until_it_ends(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    """Its clean-up is work: with the place free, as many as were cancelled would run beside it."""
    let_go = threading.Event()
    cleaning, started = threading.Event(), []

    async def handle(task: TaskInfo) -> None:
        started.append(task.id)
        if task.payload:
            try:
                await asyncio.sleep(60)
            finally:
                cleaning.set()
                await asyncio.to_thread(let_go.wait, 60)

    consumer = make(concurrency=1)
    consumer.handler("t")(handle)
    consumer.start()
    first = producer.enqueue(Task("t", "hold")).id
    wait_until(lambda: started == [first])
    second = producer.enqueue(Task("t")).id
    client.cancel_task(first)
    assert cleaning.wait(10)
    assert consumer._started().engine.running == 1
    assert states(db) == {"cancelled": 1, "pending": 1}
    let_go.set()
    wait_for_states(db, {"cancelled": 1, "completed": 1})
    assert started == [first, second]


# --- what has not started ------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_was_prefetched_and_is_cancelled_does_not_start(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection, is_async: bool
) -> None:
    started: list[int] = []
    hold, release = threading.Event(), threading.Event()

    def handle(task: TaskInfo) -> None:
        started.append(task.id)
        if task.payload == "hold":
            hold.set()
            assert release.wait(60)

    async def ahandle(task: TaskInfo) -> None:
        # Holds the loop: those that it has fetched wait behind it.
        handle(task)

    consumer = make(concurrency=1)
    consumer.handler("t")(ahandle if is_async else handle)
    consumer.start()
    # So fast that hundreds are prefetched.
    taught = [e.id for e in producer.enqueue_many(Task("t") for _ in range(500))]
    wait_for_states(db, {"completed": 500})
    first, *ids = [e.id for e in producer.enqueue_many([Task("t", "hold"), *(Task("t") for _ in range(20))])]
    assert hold.wait(10)
    wait_until(lambda: states(db).get("running") == 21, message="the rest is claimed behind the one that runs")
    cancelled = ids[3:17]
    assert client.cancel_tasks(ids=cancelled) == 14
    wait_until(lambda: consumer.stats()["cancelled"] == 14)
    release.set()
    wait_for_states(db, {"completed": 507, "cancelled": 14})
    assert started == [*taught, first, *(i for i in ids if i not in cancelled)]
    stats = consumer.stats()
    assert (stats["refused"], stats["given_back"]) == (0, 0)
    # Its books are in order: the next heartbeat finds no claim to give back, and a stop nothing to wait for.
    consumer.stop()
    assert not db.execute("SELECT FROM claim").fetchall()


# --- other ways to cancel ------------------------------------------------------------------------


def test_in_a_transaction_of_your_own_it_counts_with_the_commit(
    producer: Producer, make: Make, client: Client, dsn: str, db: psycopg.Connection
) -> None:
    handler = Sleeper()
    consumer = start(make, handler)
    id_ = producer.enqueue(Task("t")).id
    wait_until(lambda: id_ in handler.started)
    with heard(dsn, client) as messages, psycopg.connect(dsn) as conn:
        client.cancel_task_tx(conn, id_)
        assert not handler.cancelled
        conn.commit()
        counted_at = time.monotonic()
        wait_until(lambda: id_ in handler.cancelled)
        assert handler.cancelled[id_] - counted_at < 10
        # No notification in your transaction.
        assert messages() == []
    free(consumer)
    assert states(db) == {"cancelled": 1}


@ways
def test_many_are_cancelled_by_a_filter(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection, hook: Hooked, listen: bool
) -> None:
    slow, kept = Sleeper(), Looker()
    consumer = make(concurrency=60, listen=listen)
    consumer.add_handler("slow", slow)
    consumer.add_handler("kept", kept)
    consumer.start()
    ids = {producer.enqueue(Task("slow")).id for _ in range(50)}
    other = producer.enqueue(Task("kept")).id
    wait_until(lambda: set(slow.started) == ids and other in kept.started)
    assert client.cancel_tasks(types=["slow"]) == 50
    counted_at = time.monotonic()
    wait_until(lambda: set(slow.cancelled) == ids)
    assert max(slow.cancelled.values()) - counted_at < 10
    assert not kept.cancelled
    kept.release.set()
    wait_for_states(db, {"cancelled": 50, "completed": 1})
    assert consumer.stats()["cancelled"] == 50
    assert not hook.told


def test_only_the_workers_of_cancelled_tasks_are_told_and_in_pieces(
    producer: Producer, make: Make, client: Client, dsn: str, db: psycopg.Connection
) -> None:
    """A notification holds less than 8,000 bytes."""
    handler = Sleeper()
    start(make, handler, concurrency=300)
    for _ in range(300):
        producer.enqueue(Task("t"))
    wait_until(lambda: len(handler.started) == 300)
    claims = {f"{consumer}:{no}" for consumer, no in db.execute("SELECT consumer, no FROM claim").fetchall()}
    with heard(dsn, client) as messages:
        waiting = producer.enqueue(Task("another")).id
        client.cancel_task(waiting)
        assert client.cancel_tasks(states=["running"]) == 300
        told = [word for message in messages() for word in message.split(",") if ":" in word]
    assert sorted(told) == sorted(claims)
    wait_until(lambda: len(handler.cancelled) == 300)


@contextmanager
def heard(dsn: str, client: Client) -> Iterator[Callable[[], list[str]]]:
    """What is notified from here on."""
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute(f'LISTEN "fastq:{client._link.schema}"')
        yield lambda: [n.payload for n in listener.notifies(timeout=0.2)]


# --- other runs that count no longer -------------------------------------------------------------


def test_a_sync_handler_whose_time_is_up_sees_it(
    producer: Producer, make: Make, db: psycopg.Connection, hook: Hooked
) -> None:
    handler = Looker()
    consumer = start(make, handler, timeout=0.3)
    id_ = producer.enqueue(Task("t", max_attempts=1)).id
    wait_until(lambda: id_ in handler.cancelled)
    wait_for_states(db, {"failed": 1})
    # One failure: what it raised then is none.
    assert [type(error) for error in hook.told] == [TimeoutError]
    assert errors(db) == 1
    assert consumer.stats()["timed_out"] == 1


def test_a_cancelled_handler_whose_time_is_up_has_not_failed(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection, hook: Hooked
) -> None:
    started, release = threading.Event(), threading.Event()
    consumer = make(concurrency=1)

    @consumer.handler("t", timeout=1.0)
    def deaf(task: TaskInfo) -> None:
        if task.payload == "hold":
            started.set()
            release.wait(60)

    consumer.start()
    id_ = producer.enqueue(Task("t", "hold")).id
    assert started.wait(10)
    client.cancel_task(id_)
    producer.enqueue(Task("t"))
    # Its thread is replaced all the same.
    wait_for_states(db, {"cancelled": 1, "completed": 1})
    assert not release.is_set()
    assert (errors(db), hook.told, consumer.stats()["timed_out"]) == (0, [], 0)
    release.set()


def test_a_handler_whose_worker_was_taken_for_dead_sees_it(
    producer: Producer, make: Make, db: psycopg.Connection, hook: Hooked
) -> None:
    handler = Looker()
    start(make, handler, heartbeat_interval=0.2, dead_after=1.2)
    id_ = producer.enqueue(Task("t")).id
    wait_until(lambda: id_ in handler.started)
    db.execute("UPDATE consumer SET dead_at = clock_timestamp()")
    wait_until(lambda: id_ in handler.cancelled)
    assert not hook.told


def test_a_handler_that_gives_up_by_itself_has_failed(
    producer: Producer, make: Make, db: psycopg.Connection, hook: Hooked
) -> None:
    consumer = make()

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        raise TaskCancelled("nobody cancelled it")

    consumer.start()
    producer.enqueue(Task("t", max_attempts=1))
    wait_for_states(db, {"failed": 1})
    assert [type(error) for error in hook.told] == [TaskCancelled]


def test_a_cancelled_task_that_is_retried_runs_again_beside_its_old_run(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    seen: dict[int, TaskInfo] = {}
    let_go = threading.Event()
    consumer = make(concurrency=4)

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        seen[task.attempt] = task
        if task.attempt == 1:
            assert let_go.wait(60)

    consumer.start()
    id_ = producer.enqueue(Task("t")).id
    wait_until(lambda: 1 in seen)
    client.cancel_task(id_)
    wait_until(seen[1].is_cancelled)
    client.retry_task(id_)
    wait_for_states(db, {"completed": 1})
    assert (seen[1].is_cancelled(), seen[2].is_cancelled()) == (True, False)
    let_go.set()
    wait_until(lambda: consumer.stats()["refused"] == 1)
    assert states(db) == {"completed": 1}


def test_what_cancels_tasks_of_unit_tests_leaves_a_workers_alone(
    make: Make, producer: Producer, db: psycopg.Connection
) -> None:
    refused: list[TypeError] = []

    def handle(task: TaskInfo) -> None:
        try:
            testing.cancel(task)
        except TypeError as error:
            refused.append(error)
        assert not task.is_cancelled()

    consumer = make()
    consumer.add_handler("t", handle)
    consumer.start()
    producer.enqueue(Task("t"))
    wait_for_states(db, {"completed": 1})
    assert "worker's own" in str(refused)
