"""Results: what a handler returned, kept for a time and waited for in another process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import App, Client, Consumer, Producer, ResultError, ResultNotKept, Task, TaskFailed, TaskInfo, TaskNotFound
from fastq._waiting import SOON
from fastq.errors import SettingsError
from tests.support.consuming import errors, new_consumer, start_python, states, wait_for_states
from tests.support.lab import Lab
from tests.support.producing import Background
from tests.support.storage import Leader, Session, Worker, enqueue, multirange, reserve
from tests.support.waiting import wait_until

Make = Callable[..., Consumer]

#: Longer than any test takes.
TTL = 600.0


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture
def make(dsn: str, migrated: str) -> Iterator[Make]:
    """Makes consumers; those that were started are stopped at the end."""
    made: list[Consumer] = []

    def new(**settings: Any) -> Consumer:
        made.append(new_consumer(dsn, migrated, **settings))
        return made[-1]

    yield new
    for consumer in made:
        if consumer._running is not None:
            consumer.stop(5)


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


def handle(consumer: Consumer, function: Callable[[TaskInfo], Any], *, is_async: bool = False, **options: Any) -> None:
    """Have the function run tasks of type t, by itself or in a coroutine."""

    async def coroutine(task: TaskInfo) -> Any:
        await asyncio.sleep(0)
        return function(task)

    consumer.handler("t", **options)(coroutine if is_async else function)


def kept(db: psycopg.Connection) -> int:
    """How many results are kept."""
    row = db.execute("SELECT count(*) FROM result").fetchone()
    assert row is not None
    return int(row[0])


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


# --- what is kept ----------------------------------------------------------------------------------


@both
def test_what_a_handler_returned_comes_to_who_waits(
    producer: Producer, make: Make, client: Client, is_async: bool
) -> None:
    values: list[Any] = [
        None, True, 0, -1.5, 10**30, "", "grüße \U0001f600 \0", [], {}, {"a": [1, {"b": None}]}, b"", b"\x00\xff",
        "x" * 1_000_000, b"y" * 1_000_000,
    ]  # fmt: skip
    consumer = make()
    handle(consumer, lambda task: values[task.payload], is_async=is_async, result_ttl=TTL)
    consumer.start()
    ids = [found.id for found in producer.enqueue_many(Task("t", n) for n in range(len(values)))]
    found = [client.wait(id_, 20) for id_ in ids]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@both
def test_values_are_encoded_as_payloads_are(producer: Producer, make: Make, client: Client, is_async: bool) -> None:
    values: list[Any] = [(1, 2), bytearray(b"ab"), memoryview(b"cd")]
    consumer = make()
    handle(consumer, lambda task: values[task.payload], is_async=is_async, result_ttl=timedelta(minutes=10))
    consumer.start()
    ids = [found.id for found in producer.enqueue_many(Task("t", n) for n in range(len(values)))]
    assert [client.wait(id_, 20) for id_ in ids] == [[1, 2], b"ab", b"cd"]


def test_a_result_crosses_processes(dsn: str, migrated: str, producer: Producer, client: Client) -> None:
    code = f"""
from fastq import Consumer
consumer = Consumer({dsn!r}, schema={migrated!r})
@consumer.handler("t", result_ttl=600)
def double(task):
    return {{"twice": task.payload * 2}}
@consumer.handler("u", result_ttl=600)
async def triple(task):
    return task.payload * 3
print("ready", flush=True)
consumer.run()
"""
    ids = producer.enqueue(Task("t", 21)).id, producer.enqueue(Task("u", 7)).id
    with start_python(code) as process:
        try:
            assert [client.wait(id_, 30) for id_ in ids] == [{"twice": 42}, 21]
            # It is read as often as it is asked for.
            assert client.wait(ids[0], 0) == {"twice": 42}
        finally:
            process.terminate()
            process.communicate(timeout=30)


@both
def test_without_a_ttl_nothing_is_kept(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection, is_async: bool
) -> None:
    consumer = make()
    # What no result could be is dropped like any other.
    handle(consumer, lambda _: {object()}, is_async=is_async)
    consumer.start()
    id_ = producer.enqueue(Task("t")).id
    with pytest.raises(ResultNotKept, match=rf"task {id_} has completed, and its result is not there") as caught:
        client.wait(id_, 20)
    assert caught.value.task == client.get_task(id_)
    assert kept(db) == 0


def test_the_consumers_ttl_is_for_the_types_that_have_none(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    consumer = make(result_ttl=TTL)
    consumer.handler("kept")(lambda _: "a")
    consumer.handler("dropped", result_ttl=0)(lambda _: "b")
    consumer.start()
    dropped = producer.enqueue(Task("dropped")).id
    assert client.wait(producer.enqueue(Task("kept")).id, 20) == "a"
    with pytest.raises(ResultNotKept):
        client.wait(dropped, 20)
    assert kept(db) == 1


def test_a_function_of_an_app_keeps_its_result(dsn: str, migrated: str, client: Client) -> None:
    app = App(dsn, schema=migrated)

    @app.task("add", result_ttl=TTL)
    def add(a: int, b: int) -> int:
        return a + b

    @app.task("drop")
    def drop() -> int:
        return 1

    with app.consumer(poll_interval=0.2):
        assert client.wait(add.enqueue(1, b=2).id, 20) == 3
        with pytest.raises(ResultNotKept):
            client.wait(drop.enqueue().id, 20)
    app.producer.close()


def test_middleware_sees_and_keeps_it(producer: Producer, make: Make, client: Client) -> None:
    consumer = make(result_ttl=TTL)

    @consumer.use
    def around(task: TaskInfo) -> Iterator[None]:
        yield

    consumer.handler("t")(lambda task: task.payload)
    consumer.start()
    assert client.wait(producer.enqueue(Task("t", [1])).id, 20) == [1]


def test_large_results_are_stored_in_flights_of_their_own(producer: Producer, make: Make, client: Client) -> None:
    consumer = make(concurrency=8)
    handle(consumer, lambda task: "z" * 700_000 + str(task.payload), result_ttl=TTL)
    ids = [found.id for found in producer.enqueue_many(Task("t", n) for n in range(40))]
    consumer.start()
    assert [client.wait(id_, 60)[700_000:] for id_ in ids] == [str(n) for n in range(40)]


# --- what can't be kept ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": [1, {2}]}, "result.a[1]: set can't be encoded as JSON"),
        (float("nan"), "result: NaN is not a number that JSON has"),
        ({1: 2}, "result: a key is int, but JSON has only str"),
        ("x" * 100, "result has more than 100 bytes once it is encoded (result_limit)"),
        (b"x" * 101, "result has more than 100 bytes once it is encoded (result_limit)"),
        (bytearray(101), "result has more than 100 bytes once it is encoded (result_limit)"),
    ],
)
def test_what_can_not_be_kept_fails_its_task_at_once(
    producer: Producer,
    make: Make,
    client: Client,
    db: psycopg.Connection,
    is_async: bool,
    value: object,
    reason: str,
) -> None:
    told: list[tuple[BaseException, bool]] = []

    def hook(_: TaskInfo, error: BaseException, *, is_final: bool) -> None:
        told.append((error, is_final))

    consumer = make(error_hook=hook, result_limit=100)
    handle(consumer, lambda task: task.payload and value, is_async=is_async, result_ttl=TTL)
    consumer.start()
    id_, other = producer.enqueue(Task("t", 1)).id, producer.enqueue(Task("t", 0)).id
    with pytest.raises(TaskFailed) as caught:
        client.wait(id_, 20)
    assert str(caught.value) == f"task {id_} has failed: ResultError: {reason}"
    assert (caught.value.task.state, caught.value.task.attempts) == ("failed", 1)
    assert client.wait(other, 20) == 0
    assert [error for _, error, _ in errors(db)] == [f"ResultError: {reason}"]
    assert [(type(error), is_final) for error, is_final in told] == [(ResultError, True)]
    assert kept(db) == 1


@both
def test_a_result_of_the_limits_size_is_kept(producer: Producer, make: Make, client: Client, is_async: bool) -> None:
    consumer = make(result_limit=100)
    handle(
        consumer, lambda task: b"x" * 100 if task.payload == "bytes" else "x" * 98, is_async=is_async, result_ttl=TTL
    )
    consumer.start()
    assert client.wait(producer.enqueue(Task("t", "bytes")).id, 20) == b"x" * 100
    assert client.wait(producer.enqueue(Task("t", "json")).id, 20) == "x" * 98


def test_a_result_that_the_server_refuses_harms_no_neighbour(lab: Lab, client: Client, db: psycopg.Connection) -> None:
    lab.db.execute("ALTER TABLE result ADD CHECK (convert_from(value, 'UTF8') <> '13')")
    ids = lab.enqueue(*range(30))
    consumer = new_consumer(client._link._dsn, client._link.schema)
    handle(consumer, lambda task: task.payload, result_ttl=TTL)
    with consumer:
        wait_for_states(db, {"completed": 29, "failed": 1})
        assert [client.wait(id_, 20) for id_ in ids if id_ != ids[13]] == [n for n in range(30) if n != 13]
        with pytest.raises(TaskFailed, match="its result could not be stored: SQLSTATE 23514"):
            client.wait(ids[13], 20)


# --- the fence -------------------------------------------------------------------------------------


def test_a_refused_completion_stores_no_result(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def handler(task: TaskInfo) -> Any:
        if task.payload == "late":
            begun.set()
            assert go_on.wait(30)
        return task.payload

    consumer = make()
    handle(consumer, handler, result_ttl=TTL)
    consumer.start()
    late = producer.enqueue(Task("t", "late")).id
    assert begun.wait(20)
    client.cancel_task(late)
    go_on.set()
    wait_until(lambda: consumer.stats()["refused"] == 1)
    assert client.wait(producer.enqueue(Task("t", "other")).id, 20) == "other"
    with pytest.raises(TaskFailed, match=f"task {late} was cancelled"):
        client.wait(late, 20)
    assert (kept(db), states(db)) == (1, {"completed": 1, "cancelled": 1})


def complete_with_results(worker: Worker, no: int, ids: list[int], values: dict[int, bytes]) -> list[Any]:
    return worker.session.run(
        "complete_with_results",
        worker.id,
        [no],
        [multirange(ids)],
        [no],
        [multirange(ids)],
        [1],
        list(values),
        [no] * len(values),
        [TTL] * len(values),
        ["j"] * len(values),
        list(values.values()),
    )


def test_only_results_of_what_the_claim_holds_are_stored(store: Session) -> None:
    ids = list(enqueue(store, 4))
    worker = Worker(store, 1)
    [chunk] = worker.claim(4)
    assert worker.give_back({chunk.no: ids[:2]}) == {}
    rows = complete_with_results(worker, chunk.no, ids, {id_: b"%d" % id_ for id_ in ids})
    assert [no for no, _ in rows] == [chunk.no]
    assert store.sql("SELECT id, format, value FROM fastq.result ORDER BY id") == [
        (id_, "j", b"%d" % id_) for id_ in ids[2:]
    ]
    # Once more, as after an answer that was lost.
    complete_with_results(worker, chunk.no, ids, dict.fromkeys(ids, b"0"))
    assert store.value("SELECT count(*) FROM fastq.result WHERE value = '0'") == 0


def test_a_flush_whose_answer_was_lost_stores_each_result_once(lab: Lab, client: Client) -> None:
    links = lab.links()
    consumer = lab.consumer(lambda task: task.payload, dsn=links.dsn, dead_after=60, result_ttl=TTL)
    links.hold_answers("complete")
    ids = lab.enqueue(*range(5))
    links.wait_for_answer("complete")
    assert links.cut("complete") > 0
    links.flow()
    assert [client.wait(id_, 20) for id_ in ids] == list(range(5))
    wait_until(lambda: consumer.stats()["completed"] == 5)
    assert consumer.stats()["refused"] == 0


# --- how long it is kept ---------------------------------------------------------------------------


def test_after_its_time_a_result_is_shown_to_nobody(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    consumer = make(result_ttl=TTL)
    handle(consumer, lambda _: 1)
    consumer.start()
    id_ = producer.enqueue(Task("t")).id
    assert client.wait(id_, 20) == 1
    db.execute("UPDATE result SET expires_at = clock_timestamp()")
    # Whether or not the leader has removed it.
    with pytest.raises(ResultNotKept, match="the time to keep it is over"):
        client.wait(id_, 20)


def test_the_leader_removes_what_is_over(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    # A round of retention each second.
    consumer = make(completed_retention=16)
    consumer.handler("short", result_ttl=0.3)(lambda _: 1)
    consumer.handler("long", result_ttl=TTL)(lambda _: 2)
    consumer.start()
    long, _ = producer.enqueue(Task("long")).id, producer.enqueue_many(Task("short") for _ in range(20))
    wait_for_states(db, {"completed": 21})
    wait_until(lambda: kept(db) == 1)
    assert client.wait(long, 20) == 2


def test_results_are_removed_in_batches_the_oldest_first(store: Session) -> None:
    leader = Leader(store)
    leader.tick()
    store.sql(
        "INSERT INTO fastq.result SELECT g, now() + (g - 6) * interval '1 second', 'j', '1' FROM generate_series(1, 10) g"
    )
    assert leader.one("purge_results", 3) == (3,)
    assert [id_ for (id_,) in store.sql("SELECT id FROM fastq.result ORDER BY id")] == [4, 5, 6, 7, 8, 9, 10]
    wait_until(lambda: store.value("SELECT clock_timestamp() > expires_at FROM fastq.result WHERE id = 6"))
    assert leader.one("purge_results", 100)[0] >= 3
    assert store.value("SELECT min(id) FROM fastq.result") > 6


def test_a_deletion_takes_the_result_with_it(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    consumer = make(result_ttl=TTL)
    handle(consumer, lambda task: task.payload)
    consumer.start()
    gone, stays = (producer.enqueue(Task("t", n)).id for n in (1, 2))
    assert [client.wait(gone, 20), client.wait(stays, 20)] == [1, 2]
    client.delete_task(gone)
    with pytest.raises(TaskNotFound):
        client.wait(gone, 20)
    assert (client.wait(stays, 20), kept(db)) == (2, 1)


def test_a_result_may_outlive_its_task(store: Session, client: Client) -> None:
    [id_] = enqueue(store, 1)
    worker = Worker(store, 1)
    [chunk] = worker.claim(1)
    complete_with_results(worker, chunk.no, [id_], {id_: b"17"})
    # As at the end of its retention.
    store.sql("DELETE FROM fastq.done")
    assert client.wait(id_, 0) == 17


# --- the wait --------------------------------------------------------------------------------------


def test_who_waits_first_gets_it_too(producer: Producer, make: Make, client: Client) -> None:
    id_ = producer.enqueue(Task("t", 5)).id
    waiting = Background(lambda: client.wait(id_, 30))
    wait_until(lambda: any(wait.due > time.monotonic() for wait in client._waits._waits), message="it has looked")
    consumer = make(result_ttl=TTL)
    handle(consumer, lambda task: task.payload)
    consumer.start()
    assert waiting.result(30) == 5


def test_a_wait_ends_in_time(producer: Producer, client: Client) -> None:
    id_ = producer.enqueue(Task("t")).id
    for timeout in (0, 0.2, timedelta(milliseconds=50)):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=f"task {id_} has not ended within 0"):
            client.wait(id_, timeout)
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        assert seconds <= time.monotonic() - began < seconds + 5
    # It can be waited for again, and was left alone.
    assert client.get_task(id_).state == "pending"
    assert not client._waits._waits


@pytest.mark.parametrize("place", ["ready", "scheduled", "running"])
def test_what_has_not_ended_is_waited_for(store: Session, client: Client, place: str) -> None:
    if place == "scheduled":
        id_ = reserve(store, 1)
        store.sql(
            "INSERT INTO fastq.delayed (id, run_at, created_at, lane, max_attempts, task_bytes, kind, format, payload) "
            "VALUES ($1, now() + interval '1 day', now(), 1, 3, 2, 'scheduled', 'j', '{}')",
            id_,
        )
    else:
        [id_] = enqueue(store, 1)
        if place == "running":
            Worker(store, 1).claim(1)
    with pytest.raises(TimeoutError):
        client.wait(id_, 0.05)


def test_a_task_that_failed_says_why(producer: Producer, make: Make, client: Client) -> None:
    def fails(task: TaskInfo) -> None:
        raise ValueError(f"attempt {task.attempt}")

    consumer = make(result_ttl=TTL)
    handle(consumer, fails)
    consumer.start()
    id_ = producer.enqueue(Task("t", max_attempts=2)).id
    with pytest.raises(TaskFailed) as caught:
        client.wait(id_, 20)
    assert str(caught.value) == f"task {id_} has failed: ValueError: attempt 2"
    assert caught.value.task.errors is not None
    assert [error.attempt for error in caught.value.task.errors] == [1, 2]


@pytest.mark.parametrize(("state", "text"), [("cancelled", "was cancelled"), ("expired", "has expired")])
def test_a_task_that_ended_otherwise_says_how(store: Session, client: Client, state: str, text: str) -> None:
    [id_] = enqueue(store, 1)
    client.cancel_task(id_)
    store.sql("UPDATE fastq.dead SET state = $1", state)
    with pytest.raises(TaskFailed, match=f"task {id_} {text}") as caught:
        client.wait(id_, 20)
    assert caught.value.task.state == state


def test_a_task_that_was_retried_can_be_waited_for(producer: Producer, make: Make, client: Client) -> None:
    works = threading.Event()

    def handler(_: TaskInfo) -> str:
        if not works.is_set():
            raise ValueError("not yet")
        return "at last"

    consumer = make(result_ttl=TTL)
    handle(consumer, handler)
    consumer.start()
    id_ = producer.enqueue(Task("t", max_attempts=1)).id
    with pytest.raises(TaskFailed):
        client.wait(id_, 20)
    works.set()
    client.retry_task(id_)
    assert client.wait(id_, 20) == "at last"


def test_a_task_that_is_deleted_meanwhile_is_waited_for_no_longer(store: Session, client: Client) -> None:
    [id_] = enqueue(store, 1)
    waiting = Background(lambda: client.wait(id_))
    wait_until(lambda: any(wait.due > time.monotonic() for wait in client._waits._waits), message="it has looked")
    client.delete_task(id_)
    with pytest.raises(TaskNotFound):
        waiting.result(30)


@pytest.mark.parametrize("id_", [1, 0, -5, 2**63, 10**30])
def test_a_task_that_is_not_there_is_not_waited_for(client: Client, id_: int) -> None:
    with pytest.raises(TaskNotFound):
        client.wait(id_)


def test_many_wait_over_one_connection(
    producer: Producer, make: Make, client: Client, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    ids = [found.id for found in producer.enqueue_many(Task("t", n) for n in range(60))]
    waiting = [Background(lambda id_=id_: client.wait(id_, 60)) for id_ in ids]  # type: ignore[misc]
    wait_until(lambda: len(client._waits._waits) == 60 and all(wait.pause > SOON for wait in client._waits._waits))
    consumer = make(result_ttl=TTL)
    handle(consumer, lambda task: task.payload)
    assert client._link._db is not None
    pid = client._link._db._connection.info.backend_pid
    consumer.start()
    assert [one.result(60) for one in waiting] == list(range(60))
    # No other was made meanwhile: none was needed.
    assert client._link._db._connection.info.backend_pid == pid


def test_a_connection_that_is_lost_meanwhile_is_made_again(
    producer: Producer, make: Make, client: Client, db: psycopg.Connection
) -> None:
    id_ = producer.enqueue(Task("t", 5)).id
    waiting = Background(lambda: client.wait(id_, 60))
    wait_until(lambda: any(wait.due > time.monotonic() for wait in client._waits._waits), message="it has looked")
    assert client._link._db is not None
    db.execute("SELECT pg_terminate_backend(%s)", [client._link._db._connection.info.backend_pid])
    consumer = make(result_ttl=TTL)
    handle(consumer, lambda task: task.payload)
    consumer.start()
    assert waiting.result(60) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"id": "7"}, {"id": 7.0}, {"id": True}, {"id": None},
        {"timeout": -1}, {"timeout": "1"}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"timeout": True},
        {"poll_interval": 0}, {"poll_interval": -1}, {"poll_interval": None}, {"poll_interval": "1"},
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(client: Client, arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        client.wait(**{"id": 7, "timeout": 0, **arguments})
