"""Producer: what is enqueued is in the tables when the call returns, and answered in input order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from fastq import ConnectionLost, DatabaseError, Enqueued, EnqueueError, Producer, SchemaError, SettingsError, Task
from tests.support.waiting import wait_until

Make = Callable[..., Producer]


@pytest.fixture
def make(dsn: str, migrated: str) -> Iterator[Make]:
    """Makes producers that are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Producer(dsn, schema=migrated, **settings))


@pytest.fixture
def producer(make: Make) -> Producer:
    return make()


def _rows(db: psycopg.Connection, *columns: str) -> list[tuple[Any, ...]]:
    return db.execute(f"SELECT {', '.join(columns)} FROM tasks ORDER BY id").fetchall()  # noqa: S608 - names from here


def test_one_task_is_in_the_tables_when_the_call_returns(producer: Producer, db: psycopg.Connection) -> None:
    id_, is_new = producer.enqueue(
        Task("email:send", {"to": "ä", "n": [1, 2.5, None, True]}, queue="mail", max_attempts=5)
    )
    assert is_new
    assert _rows(db, "id", "type", "queue", "state", "attempts", "max_attempts", "payload") == [
        (id_, "email:send", "mail", "pending", 0, 5, '{"to":"ä","n":[1,2.5,null,true]}')
    ]


def test_bytes_are_kept_as_they_are(producer: Producer, db: psycopg.Connection) -> None:
    producer.enqueue(Task("t", b"\x00\xff"))
    assert _rows(db, "payload") == [("00ff",)]


def test_many_are_answered_in_input_order(producer: Producer, db: psycopg.Connection) -> None:
    results = producer.enqueue_many(Task("t", number) for number in range(2500))
    assert len(results) == 2500
    assert all(result.is_new for result in results)
    payloads = {id_: int(payload) for id_, payload in _rows(db, "id", "payload")}
    assert [payloads[result.id] for result in results] == list(range(2500))


def test_results_are_a_sequence(producer: Producer) -> None:
    results = producer.enqueue_many([Task("t", number) for number in range(10)])
    ids = [result.id for result in results]
    assert isinstance(results[0], Enqueued)
    assert results[-1].id == ids[-1]
    assert [result.id for result in results[2:8:2]] == ids[2:8:2]
    assert [result.id for result in results[::-1][1:3]] == ids[::-1][1:3]
    assert results[3] in results
    assert results.index(results[3]) == 3
    for index in (10, -11):
        with pytest.raises(IndexError, match=f"index {index} of 10 results"):
            _ = results[index]


def test_results_cost_at_most_sixteen_bytes_a_task(producer: Producer) -> None:
    import tracemalloc  # noqa: PLC0415 - it slows all others down

    tracemalloc.start()
    try:
        results = producer.enqueue_many(Task("t") for _ in range(20_000))
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 16 * 20_000
    finally:
        tracemalloc.stop()
    assert len(results) == 20_000


def test_nothing_is_nothing(producer: Producer, db: psycopg.Connection) -> None:
    assert list(producer.enqueue_many([])) == []
    assert list(producer.enqueue_many(iter(()), commit_every=10)) == []
    assert _rows(db, "id") == []


def test_any_iterable_of_mixed_types_and_queues(producer: Producer, db: psycopg.Connection) -> None:
    tasks = [Task("a"), Task("b", queue="q"), Task("a"), Task("a", max_attempts=1)]
    for iterable in (tasks, tuple(tasks), iter(tasks), (task for task in tasks)):
        producer.enqueue_many(iterable)
    assert sorted(_rows(db, "type", "queue", "max_attempts")) == sorted(
        [("a", "default", 3), ("b", "q", 3), ("a", "default", 3), ("a", "default", 1)] * 4
    )


def test_a_delayed_task_waits_for_its_time(producer: Producer, db: psycopg.Connection) -> None:
    now = datetime.now(UTC)
    results = producer.enqueue_many(
        [
            Task("t", delay=3600),
            Task("t", delay=timedelta(hours=1)),
            Task("t", run_at=now + timedelta(hours=1)),
            Task("t", delay=0),
            # run_at wins over delay; a time gone by is due now.
            Task("t", run_at=now - timedelta(hours=1), delay=3600),
        ]
    )
    found = {id_: rest for id_, *rest in _rows(db, "id", "state", "kind", "run_at")}
    rows = [tuple(found[result.id]) for result in results]
    assert [row[:2] for row in rows[:4]] == [("pending", "scheduled")] * 3 + [("pending", None)]
    assert rows[4][0] == "pending"
    assert rows[4][2] is None or rows[4][2] < now
    for _, _, run_at in rows[:3]:
        assert abs(run_at - now - timedelta(hours=1)) < timedelta(minutes=1)


def test_a_duplicate_answers_the_existing_id(producer: Producer, db: psycopg.Connection) -> None:
    first = producer.enqueue(Task("t", 1, idempotency_token="x"))
    assert producer.enqueue(Task("t", 2, idempotency_token="x")) == Enqueued(first.id, is_new=False)
    # A token is its type's.
    assert producer.enqueue(Task("other", 3, idempotency_token="x")).is_new
    assert producer.enqueue(Task("t", 4)).is_new
    assert [row[0] for row in _rows(db, "payload")] == ["1", "3", "4"]


def test_duplicates_in_bulk_are_answered_in_input_order(producer: Producer) -> None:
    held = producer.enqueue(Task("t", idempotency_token="held")).id
    results = producer.enqueue_many(
        [
            Task("t", idempotency_token="held"),
            Task("t"),
            Task("t", idempotency_token="new"),
            Task("t", idempotency_token="held"),
            Task("t", idempotency_token="new"),
        ]
    )
    assert [result.is_new for result in results] == [False, True, True, False, False]
    assert [results[index].id for index in (0, 3)] == [held, held]
    assert results[4].id == results[2].id
    assert len({result.id for result in results}) == 3


def test_threads_share_a_producer(producer: Producer, db: psycopg.Connection) -> None:
    ids: list[int] = []

    def work() -> None:
        for _ in range(25):
            ids.append(producer.enqueue(Task("t")).id)  # noqa: PERF401 - one at a time is the point

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 200
    assert sorted(ids) == [row[0] for row in _rows(db, "id")]
    assert producer.stats()["enqueued"] == 200
    assert producer.stats()["flights"] < 200


# --- async -----------------------------------------------------------------------------------------


def test_coroutines_share_a_producer(producer: Producer, db: psycopg.Connection) -> None:
    async def main() -> list[Enqueued]:
        return await asyncio.gather(*(producer.aenqueue(Task("t", number)) for number in range(300)))

    results = asyncio.run(main())
    payloads = {id_: int(payload) for id_, payload in _rows(db, "id", "payload")}
    assert [payloads[result.id] for result in results] == list(range(300))
    assert producer.stats()["flights"] < 300


def test_loops_may_come_and_go(producer: Producer) -> None:
    ids = {asyncio.run(producer.aenqueue(Task("t"))).id for _ in range(5)}
    assert len(ids) == 5


def test_two_loops_at_once(producer: Producer) -> None:
    ids: list[int] = []

    async def main() -> None:
        for _ in range(20):
            result = await producer.aenqueue(Task("t"))
            ids.append(result.id)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 60


def test_a_cancelled_awaiter_harms_no_other(producer: Producer) -> None:
    async def main() -> None:
        waiting = [asyncio.create_task(producer.aenqueue(Task("t"))) for _ in range(10)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        assert all(isinstance(result, Enqueued) for result in results[1::2])
        assert (await producer.aenqueue(Task("t"))).is_new

    asyncio.run(main())


def test_many_from_async_code(producer: Producer, db: psycopg.Connection) -> None:
    async def numbers() -> AsyncIterator[Task]:
        for number in range(3000):
            if number % 100 == 0:
                await asyncio.sleep(0)
            yield Task("t", number)

    async def main() -> None:
        assert len(await producer.aenqueue_many(numbers())) == 3000
        assert len(await producer.aenqueue_many([Task("t", 3000)])) == 1
        assert len(await producer.aenqueue_many((Task("t", n) for n in (3001, 3002)), commit_every=1)) == 2

    asyncio.run(main())
    assert [int(row[0]) for row in _rows(db, "payload")] == list(range(3003))


def test_the_loop_runs_on_while_many_are_written(producer: Producer) -> None:
    async def main() -> None:
        turns = 0
        writing = asyncio.create_task(producer.aenqueue_many(Task("t", number) for number in range(20_000)))
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(await writing) == 20_000
        assert turns > 10

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_cancelled_many_are_rolled_back(producer: Producer, db: psycopg.Connection, kind: str) -> None:
    given = threading.Event()

    def endless() -> Iterator[Task]:
        for number in range(10**9):
            if number == 30_000:
                given.set()
            yield Task("t", number)

    async def aendless() -> AsyncIterator[Task]:
        for task in endless():
            if given.is_set():
                await asyncio.sleep(0)
            yield task

    async def main() -> None:
        writing = asyncio.create_task(producer.aenqueue_many(endless() if kind == "sync" else aendless()))
        await asyncio.to_thread(given.wait)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(main())
    open_transactions = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE state LIKE 'idle in transaction%' AND pid <> pg_backend_pid() AND query LIKE '%' || current_schema() || '%'"
    )
    wait_until(lambda: db.execute(open_transactions).fetchone() == (0,), message="the rollback")
    assert _rows(db, "id") == []


# --- what is refused -------------------------------------------------------------------------------


def test_sync_calls_where_a_loop_runs(producer: Producer, db: psycopg.Connection) -> None:
    async def main() -> None:
        with pytest.raises(EnqueueError, match=r"event loop runs.*await producer.aenqueue"):
            producer.enqueue(Task("t"))
        with pytest.raises(EnqueueError, match=r"event loop runs.*await producer.aenqueue_many"):
            producer.enqueue_many([Task("t")])

    asyncio.run(main())
    assert _rows(db, "id") == []


def test_what_is_no_task(producer: Producer) -> None:
    with pytest.raises(TypeError, match=r"a fastq\.Task is wanted, not str"):
        producer.enqueue("email:send")  # type: ignore[arg-type]
    for tasks in (Task("t"), 5):
        with pytest.raises(TypeError, match=r"an iterable of fastq\.Task is wanted"):
            producer.enqueue_many(tasks)  # type: ignore[arg-type]

    async def main() -> None:
        with pytest.raises(TypeError, match=r"a fastq\.Task is wanted"):
            await producer.aenqueue({"type": "t"})  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_closed_producer(make: Make) -> None:
    producer = make()
    producer.enqueue(Task("t"))
    producer.close()
    producer.close()
    with pytest.raises(EnqueueError, match="closed"):
        producer.enqueue(Task("t"))
    with pytest.raises(EnqueueError, match="closed"):
        producer.enqueue_many([Task("t")])
    with pytest.raises(EnqueueError, match="closed"):
        asyncio.run(producer.aenqueue(Task("t")))
    with pytest.raises(EnqueueError, match="closed"):
        asyncio.run(producer.aenqueue_many([Task("t")]))


def test_a_close_while_coroutines_wait(make: Make) -> None:
    producer = make()

    async def main() -> None:
        waiting = [asyncio.create_task(producer.aenqueue(Task("t"))) for _ in range(50)]
        await asyncio.sleep(0)
        await producer.aclose()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, Enqueued | EnqueueError)

    asyncio.run(main())


def test_a_forgotten_producer_closes_itself(dsn: str, migrated: str) -> None:
    before = threading.active_count()
    producer = Producer(dsn, schema=migrated)
    producer.enqueue(Task("t"))
    gone = weakref.ref(producer)
    del producer
    gc.collect()
    assert gone() is None
    wait_until(lambda: threading.active_count() <= before, message="the end of its threads")


def test_context_managers(dsn: str, migrated: str) -> None:
    with Producer(dsn, schema=migrated) as producer:
        producer.enqueue(Task("t"))
    with pytest.raises(EnqueueError):
        producer.enqueue(Task("t"))

    async def main() -> Producer:
        async with Producer(dsn, schema=migrated) as producer:
            await producer.aenqueue(Task("t"))
        return producer

    with pytest.raises(EnqueueError):
        asyncio.run(main()).enqueue(Task("t"))


@pytest.mark.parametrize(
    "settings", [{"payload_limit": 0}, {"iterable_timeout": -1}, {"schema": "x" * 64}, {"schema": ""}, {"pool": 3}]
)
def test_settings_that_are_refused(dsn: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        Producer(dsn, **settings)


def test_a_schema_that_is_not_migrated(dsn: str, schema: str) -> None:
    with Producer(dsn, schema=schema) as producer:
        for call in (
            lambda: producer.enqueue(Task("t")),
            lambda: producer.enqueue_many(Task("t") for _ in range(20_000)),
            lambda: asyncio.run(producer.aenqueue(Task("t"))),
        ):
            with pytest.raises(SchemaError, match="fastq migrate"):
                call()


def test_no_server_and_no_password_in_the_error(schema: str) -> None:
    with Producer("postgresql://me:s3cret@127.0.0.1:1/db", schema=schema, connect_timeout=2) as producer:
        with pytest.raises(DatabaseError) as caught:
            producer.enqueue(Task("t"))
        assert caught.value.is_transient
        assert "s3cret" not in f"{caught.value!r} {caught.value}"


def test_a_dsn_that_can_not_be_read() -> None:
    with pytest.raises(SettingsError) as caught, Producer("postgresql://me:s3cret@:x:y/db") as producer:
        producer.enqueue(Task("t"))
    assert "s3cret" not in str(caught.value)


def test_a_cut_connection_is_lost_and_made_anew(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    producer = Producer(make_conninfo(dsn, application_name=migrated), schema=migrated)
    producer.enqueue(Task("t"))
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
    assert db.execute(kill, [migrated]).fetchall()
    # Whether the cut is noticed before or after the next statement is sent, a task is in when the call says so.
    enqueued = 0
    for _ in range(3):
        with contextlib.suppress(ConnectionLost):
            producer.enqueue(Task("t"))
            enqueued += 1
    assert enqueued >= 1
    assert len(_rows(db, "id")) >= 1 + enqueued
    producer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told(dsn: str, migrated: str) -> None:
    code = f"""
import asyncio, os, sys
import fastq
producer = fastq.Producer({dsn!r}, schema={migrated!r})
producer.enqueue(fastq.Task("t"))
child = os.fork()
if child == 0:
    for call in (
        lambda: producer.enqueue(fastq.Task("t")),
        lambda: producer.enqueue_many([fastq.Task("t")]),
        lambda: asyncio.run(producer.aenqueue(fastq.Task("t"))),
    ):
        try:
            call()
        except fastq.EnqueueError as error:
            assert "fork" in str(error), error
        else:
            sys.exit(3)
    # One of its own works.
    with fastq.Producer({dsn!r}, schema={migrated!r}) as own:
        own.enqueue(fastq.Task("t"))
    sys.exit(0)
_, status = os.waitpid(child, 0)
producer.enqueue(fastq.Task("t"))
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert _run_python(code) == 0


def _run_python(code: str) -> int:
    import subprocess  # noqa: PLC0415 - only here

    return subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode
