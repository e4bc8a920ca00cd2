"""A consumer's start and stop: in threads, and on the caller's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import psycopg
import pytest

from fastq import Consumer, ConsumerError, DatabaseError, Producer, SchemaError, Task, TaskInfo
from tests.support.consuming import new_consumer, states, wait_for_states
from tests.support.waiting import wait_until, wait_until_async


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def consumer(dsn: str, migrated: str) -> Iterator[Consumer]:
    """One with a sync and an async handler of its own types, which do nothing."""
    consumer = new_consumer(dsn, migrated)
    consumer.handler("sync")(lambda _: None)

    @consumer.handler("async")
    async def handle(task: TaskInfo) -> None: ...

    yield consumer
    if consumer._running is not None and consumer._running.own_loop:
        consumer.stop(5)


def _consumers(db: psycopg.Connection) -> int:
    row = db.execute("SELECT count(*) FROM consumer").fetchone()
    assert row is not None
    return int(row[0])


# --- in threads ------------------------------------------------------------------------------------


def test_a_start_and_a_stop_leave_nothing_behind(
    producer: Producer, consumer: Consumer, db: psycopg.Connection
) -> None:
    producer.enqueue_many([Task("sync"), Task("async")])
    before = threading.active_count()
    consumer.start()
    assert _consumers(db) == 1
    wait_for_states(db, {"completed": 2})
    consumer.stop()
    assert _consumers(db) == 0
    # Those that tests before this one gave up may end meanwhile.
    assert threading.active_count() <= before


def test_a_consumer_runs_once(consumer: Consumer) -> None:
    consumer.start()
    with pytest.raises(ConsumerError, match="started before"):
        consumer.start()
    with pytest.raises(ConsumerError, match="started before"):
        consumer.run()
    with pytest.raises(ConsumerError, match="before the start"):
        consumer.handler("late")(lambda _: None)
    consumer.stop()
    consumer.stop()
    with pytest.raises(ConsumerError, match="started before"):
        consumer.start()
    with pytest.raises(ConsumerError, match="started before"):
        asyncio.run(consumer.arun())


def test_a_with_starts_and_stops(producer: Producer, consumer: Consumer, db: psycopg.Connection) -> None:
    producer.enqueue(Task("sync"))
    with consumer as entered:
        assert entered is consumer
        wait_for_states(db, {"completed": 1})
    assert _consumers(db) == 0


def test_a_stop_waits_for_running_handlers(producer: Producer, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    started, release = threading.Event(), threading.Event()
    consumer = new_consumer(dsn, migrated, concurrency=1)

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        started.set()
        assert release.wait(20)

    producer.enqueue_many(Task("t") for _ in range(10))
    consumer.start()
    assert started.wait(20)
    stopping = threading.Thread(target=consumer.stop, args=(20,))
    stopping.start()
    # What has not started is given back at once, without a charge.
    wait_until(lambda: states(db) == {"running": 1, "pending": 9})
    assert stopping.is_alive()
    release.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert states(db) == {"completed": 1, "pending": 9}
    assert db.execute("SELECT max(attempts) FROM tasks WHERE state = 'pending'").fetchone() == (0,)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_stop_gives_up_in_time(
    producer: Producer,
    dsn: str,
    migrated: str,
    db: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    is_async: bool,
) -> None:
    started, release = threading.Event(), threading.Event()
    cancelled = threading.Event()
    consumer = new_consumer(dsn, migrated)

    def handle(task: TaskInfo) -> None:
        started.set()
        release.wait(20)

    async def ahandle(task: TaskInfo) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    consumer.handler("t")(ahandle if is_async else handle)
    producer.enqueue(Task("t"))
    consumer.start()
    assert started.wait(20)
    consumer.stop(0.2)
    assert "1 handlers did not end in time" in caplog.text
    if is_async:
        assert cancelled.wait(5)
    # Its task is another consumer's now; what the old one still does to it counts for nothing.
    other = new_consumer(dsn, migrated)
    other.handler("t")(lambda _: None)
    with other:
        wait_for_states(db, {"completed": 1})
    release.set()
    assert db.execute("SELECT attempts FROM tasks").fetchone() == (2,)


def test_a_handler_can_not_stop_its_consumer(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    raised: list[ConsumerError] = []
    consumer = new_consumer(dsn, migrated)

    def stop(task: TaskInfo) -> None:
        try:
            consumer.stop()
        except ConsumerError as error:
            raised.append(error)

    async def astop(task: TaskInfo) -> None:
        await asyncio.sleep(0)
        stop(task)

    consumer.handler("sync")(stop)
    consumer.handler("async")(astop)
    producer.enqueue_many([Task("sync"), Task("async")])
    with consumer:
        wait_for_states(db, {"completed": 2})
    assert ["own handlers" in str(error) for error in raised] == [True, True]


def test_a_schema_that_is_not_migrated(dsn: str, schema: str) -> None:
    consumer = new_consumer(dsn, schema)
    consumer.handler("t")(lambda _: None)
    before = threading.active_count()
    for _ in range(2):
        # It was never started, so it can be tried again.
        with pytest.raises(SchemaError, match="fastq migrate"):
            consumer.start()
    with pytest.raises(SchemaError):
        consumer.run()
    with pytest.raises(SchemaError):
        asyncio.run(consumer.arun())
    # Those that tests before this one gave up may end meanwhile.
    assert threading.active_count() <= before


def test_no_server_and_no_password_in_the_error() -> None:
    consumer = Consumer("postgresql://me:s3cret@127.0.0.1:1/db", connect_timeout=2)

    async def handle(task: TaskInfo) -> None: ...

    consumer.handler("t")(handle)
    with pytest.raises(DatabaseError) as caught:
        consumer.start()
    assert caught.value.is_transient
    assert "s3cret" not in f"{caught.value!r} {caught.value}"


# --- on the caller's loop --------------------------------------------------------------------------


def test_async_with_runs_handlers_on_the_callers_loop(
    producer: Producer, consumer: Consumer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()
    consumer = new_consumer(dsn, migrated)

    @consumer.handler("async")
    async def handle(task: TaskInfo) -> None:
        loops.add(asyncio.get_running_loop())

    consumer.handler("sync")(lambda _: None)
    producer.enqueue_many(Task(("sync", "async")[number % 2]) for number in range(200))

    async def main() -> None:
        async with consumer as entered:
            assert entered is consumer
            await wait_until_async(lambda: states(db) == {"completed": 200})
            assert loops == {asyncio.get_running_loop()}
            for call in (consumer.stop, consumer.start):
                with pytest.raises(ConsumerError, match="event loop"):
                    call()
            with pytest.raises(ConsumerError, match=r"leave its `async with`"):
                await asyncio.to_thread(consumer.stop)

    before = threading.active_count()
    asyncio.run(main())
    assert _consumers(db) == 0
    assert threading.active_count() <= before


def test_leaving_async_with_waits_for_running_handlers(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    consumer = new_consumer(dsn, migrated)
    started, ended = asyncio.Event(), False

    @consumer.handler("t")
    async def handle(task: TaskInfo) -> None:
        nonlocal ended
        started.set()
        await asyncio.sleep(0.3)
        ended = True

    producer.enqueue(Task("t"))

    async def main() -> None:
        async with consumer:
            await asyncio.wait_for(started.wait(), 10)

    asyncio.run(main())
    assert ended
    assert states(db) == {"completed": 1}


def test_leaving_async_with_gives_up_in_time(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    consumer = new_consumer(dsn, migrated, stop_timeout=0.2)
    started, cancelled = asyncio.Event(), False

    @consumer.handler("t")
    async def handle(task: TaskInfo) -> None:
        nonlocal cancelled
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled = True

    producer.enqueue(Task("t"))

    async def main() -> None:
        async with consumer:
            await asyncio.wait_for(started.wait(), 10)
        assert cancelled
        # Nothing of it is left on the loop.
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert _consumers(db) <= 1


def test_an_error_inside_async_with_goes_on(consumer: Consumer, db: psycopg.Connection) -> None:
    async def main() -> None:
        async with consumer:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert _consumers(db) == 0


def test_a_cancelled_arun_stops(producer: Producer, consumer: Consumer, db: psycopg.Connection) -> None:
    producer.enqueue_many([Task("async"), Task("sync")])

    async def main() -> None:
        running = asyncio.create_task(consumer.arun())
        await wait_until_async(lambda: states(db) == {"completed": 2})
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert _consumers(db) == 0

    asyncio.run(main())


def test_a_start_that_is_cancelled_leaves_nothing_running(consumer: Consumer, db: psycopg.Connection) -> None:
    async def main() -> None:
        starting = asyncio.create_task(consumer.__aenter__())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await wait_until_async(lambda: _consumers(db) == 0)

    asyncio.run(main())
    wait_until(lambda: _consumers(db) == 0)
