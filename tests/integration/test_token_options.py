"""What a token's options do: among which tasks it is unique, how long it is held, and what becomes of a task that meets it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest

from fastq import Client, DuplicateTask, Enqueued, Producer, Task
from tests.support.producing import value
from tests.support.storage import Leader, Session, Worker
from tests.support.users import asyncpg_words
from tests.support.waiting import wait_until

Enqueue = Callable[[Sequence[Task]], Sequence[Enqueued]]

#: Every way in which tasks get in.
WAYS = (
    "single",
    "few",
    "many",
    "committed",
    "async",
    "async many",
    "tx",
    "tx few",
    "tx many",
    "asyncpg",
    "asyncpg many",
)


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture(params=WAYS)
def enqueue(request: pytest.FixtureRequest, producer: Producer, dsn: str) -> Enqueue:
    return way(request.param, producer, dsn)


def way(name: str, producer: Producer, dsn: str) -> Enqueue:
    """Enqueues all of a call in that way; of "many" more come along than go in one statement, after those that are answered."""
    rest = [Task("rest", n) for n in range(60)]

    async def in_asyncpg(tasks: Sequence[Task], *, is_one: bool) -> list[Enqueued]:
        connection = await asyncpg.connect(**asyncpg_words(dsn))
        try:
            async with connection.transaction():
                if is_one:
                    return [await producer.aenqueue_tx(connection, task) for task in tasks]
                return list(await producer.aenqueue_many_tx(connection, [*tasks, *rest]))[: len(tasks)]
        finally:
            await connection.close()

    async def one_by_one(tasks: Sequence[Task]) -> list[Enqueued]:
        return [await producer.aenqueue(task) for task in tasks]

    def in_psycopg(tasks: Sequence[Task]) -> list[Enqueued]:
        with psycopg.connect(dsn) as connection:
            if name == "tx":
                return [producer.enqueue_tx(connection, task) for task in tasks]
            more = rest if name == "tx many" else []
            return list(producer.enqueue_many_tx(connection, [*tasks, *more]))[: len(tasks)]

    ways: dict[str, Enqueue] = {
        "single": lambda tasks: [producer.enqueue(task) for task in tasks],
        "few": producer.enqueue_many,
        "many": lambda tasks: producer.enqueue_many([*tasks, *rest])[: len(tasks)],
        "committed": lambda tasks: producer.enqueue_many([*tasks, *rest], commit_every=2)[: len(tasks)],
        "async": lambda tasks: asyncio.run(one_by_one(tasks)),
        "async many": lambda tasks: asyncio.run(producer.aenqueue_many([*tasks, *rest])),
        "tx": in_psycopg,
        "tx few": in_psycopg,
        "tx many": in_psycopg,
        "asyncpg": lambda tasks: asyncio.run(in_asyncpg(tasks, is_one=True)),
        "asyncpg many": lambda tasks: asyncio.run(in_asyncpg(tasks, is_one=False)),
    }
    return ways[name]


def one(enqueue: Enqueue, payload: object = None, **options: Any) -> Enqueued:
    return enqueue([Task(options.pop("type", "t"), payload, **{"idempotency_token": "x", **options})])[0]


def let_expire(db: psycopg.Connection) -> None:
    """The time of every token that has one is over."""
    db.execute("UPDATE token SET expires_at = clock_timestamp() WHERE expires_at IS NOT NULL")


# --- scope ---------------------------------------------------------------------------------------


def test_a_token_is_unique_in_its_scope(enqueue: Enqueue, db: psycopg.Connection) -> None:
    first = one(enqueue, token_scope="queue", queue="q", type="a")
    assert one(enqueue, token_scope="queue", queue="q", type="b") == (first.id, False)
    assert one(enqueue, token_scope="queue", queue="r", type="a").is_new
    everywhere = one(enqueue, token_scope="global", queue="q", type="a")
    assert everywhere.is_new
    assert one(enqueue, token_scope="global", queue="s", type="c") == (everywhere.id, False)
    typed = one(enqueue, type="a", queue="q")
    assert typed.is_new
    assert one(enqueue, type="a", queue="r", token_scope="type") == (typed.id, False)
    assert value(db, "SELECT count(*) FROM token") == 4


def test_scopes_of_any_names_never_meet(producer: Producer) -> None:
    tasks = [
        Task("t", queue=queue, idempotency_token=token, token_scope="queue")
        for queue, token in [("a", "b:c"), ("a:b", "c"), ("1", ":a"), ("a", "1:a:c"), ("ü", "c")]
    ]
    tasks += [Task("t", idempotency_token=token, token_scope="global") for token in ("1:a:b:c", "a", ":a", "c")]
    tasks += [Task("t", idempotency_token=token) for token in ("1:a:b:c", ":a", "a")]
    assert all(result.is_new for result in producer.enqueue_many(tasks))
    assert not any(result.is_new for result in producer.enqueue_many(tasks))


def test_the_longest_names_of_a_scope_are_stored(producer: Producer) -> None:
    task = Task("t", queue="\U0001f600" * 255, idempotency_token="\U0001f601" * 255, token_scope="queue")
    assert producer.enqueue(task).is_new
    assert not producer.enqueue(task).is_new


# --- until its task has ended --------------------------------------------------------------------


def test_a_token_is_free_once_its_task_has_ended(enqueue: Enqueue, client: Client, store: Session) -> None:
    worker = Worker(store, 1)
    held = one(enqueue, 1, token_until="ended")
    assert one(enqueue, 2, token_until="ended") == (held.id, False), "it waits"
    [chunk] = [chunk for chunk in worker.claim(1) if chunk.lo == held.id]
    assert one(enqueue, 3, token_until="ended") == (held.id, False), "it runs"
    worker.fail(chunk.no, [held.id], 60.0)
    assert one(enqueue, 4, token_until="ended") == (held.id, False), "it waits for another attempt"
    client.cancel_task(held.id)
    following = one(enqueue, 5, token_until="ended")
    assert following.is_new
    assert client.get_task(following.id).payload == 5
    assert one(enqueue, 6) == (following.id, False), "whoever asks: the task that has it decides how long"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "removed"])
def test_whatever_ends_the_task_frees_its_token(producer: Producer, client: Client, store: Session, end: str) -> None:
    def again() -> Enqueued:
        return producer.enqueue(Task("t", idempotency_token="x", token_until="ended"))

    first, worker = again(), Worker(store, 1)
    [chunk] = worker.claim(1)
    if end == "failed":
        worker.fail(chunk.no, [first.id])
    elif end == "cancelled":
        client.cancel_task(first.id)
    else:
        worker.complete({chunk.no: [first.id]})
    if end == "removed":
        leader = Leader(store)
        leader.tick()
        leader.run("open_leaf", 0.0)
        assert leader.empty_leaf(0)
    second = again()
    assert second.is_new
    assert again() == (second.id, False)


def test_a_token_that_was_taken_over_is_no_longer_the_old_tasks(producer: Producer, client: Client) -> None:
    task = Task("t", idempotency_token="x", token_until="ended")
    first = producer.enqueue(task)
    client.cancel_task(first.id)
    second = producer.enqueue(task)
    client.retry_task(first.id)
    assert producer.enqueue(task) == (second.id, False)
    client.cancel_task(first.id)
    client.delete_task(first.id)
    assert producer.enqueue(task) == (second.id, False)


def test_tokens_of_ended_tasks_are_taken_over_in_input_order(producer: Producer, client: Client) -> None:
    tasks = [
        Task("t", n, idempotency_token=f"{n % 300:03}", token_until="ended" if n % 2 else "removed") for n in range(300)
    ]
    first = list(producer.enqueue_many(tasks))
    client.cancel_tasks(states=["pending"])
    again = list(producer.enqueue_many([*tasks, *tasks]))
    for n in range(300):
        assert again[n].is_new == (n % 2 == 1)
        assert again[n + 300] == (again[n].id, False)
        assert (again[n].id == first[n].id) == (n % 2 == 0)


# --- for a time ----------------------------------------------------------------------------------


def test_a_token_is_free_when_its_time_is_over(enqueue: Enqueue, db: psycopg.Connection) -> None:
    first = one(enqueue, token_ttl=timedelta(minutes=10))
    left = value(db, "SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM token")
    assert 0 < left <= 600
    assert one(enqueue, token_ttl=10) == (first.id, False)
    let_expire(db)
    second = one(enqueue)
    assert second.is_new
    let_expire(db)
    assert one(enqueue) == (second.id, False), "taken without a time, it has none"


def test_a_short_time_passes_by_itself(producer: Producer) -> None:
    task = Task("t", idempotency_token="x", token_ttl=0.05)
    first = producer.enqueue(task)
    wait_until(lambda: producer.enqueue(task).id != first.id, timeout=5.0)


def test_whichever_comes_first_frees_a_token_with_both(
    producer: Producer, client: Client, db: psycopg.Connection
) -> None:
    task = Task("t", idempotency_token="x", token_ttl=600, token_until="ended")
    first = producer.enqueue(task)
    client.cancel_task(first.id)
    second = producer.enqueue(task)
    assert second.is_new
    let_expire(db)
    assert producer.enqueue(task).is_new


def test_upkeep_forgets_tokens_by_their_time(producer: Producer, db: psycopg.Connection, store: Session) -> None:
    """One whose task is long gone is held until its time is over; one whose time is over goes, though its task is there."""
    for token, ttl in (("kept", 3600), ("over", 0.000_001)):
        producer.enqueue(Task("t", idempotency_token=token, token_ttl=ttl))
    db.execute("UPDATE token SET created_at = created_at - interval '1 year'")
    db.execute("UPDATE token SET id = -1 WHERE token = 'kept'")
    leader = Leader(store)
    leader.tick()
    assert leader.one("purge_tokens", 3600.0, "", "", 100)[0] == 1
    assert [row[0] for row in db.execute("SELECT token FROM token").fetchall()] == ["kept"]


# --- conflicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WAYS if name != "committed"])
def test_raise_names_the_task_and_writes_nothing_of_the_call(
    producer: Producer, dsn: str, db: psycopg.Connection, name: str
) -> None:
    enqueue = way(name, producer, dsn)
    existing = producer.enqueue(Task("t", idempotency_token="x"))
    is_one = name in {"single", "async", "tx", "asyncpg"}
    calls = [Task("t", n, idempotency_token=f"new{n}", on_conflict="raise") for n in range(2)]
    with pytest.raises(DuplicateTask, match=f"task {existing.id} has this idempotency token") as error:
        enqueue([*([] if is_one else calls), Task("t", idempotency_token="x", on_conflict="raise")])
    assert error.value.existing_id == existing.id
    assert error.value.index == (None if is_one else 2)
    assert error.value.committed is None
    assert value(db, "SELECT count(*) FROM tasks") == 1
    assert value(db, "SELECT count(*) FROM token") == 1
    assert all(result.is_new for result in enqueue(calls)), "what was rolled back has kept no token"


def test_raise_with_commit_every_keeps_what_is_committed(producer: Producer, db: psycopg.Connection) -> None:
    tasks = [Task("t", n, idempotency_token=f"{n % 7}", on_conflict="raise") for n in range(10)]
    with pytest.raises(DuplicateTask) as error:
        producer.enqueue_many(tasks, commit_every=4)
    first = value(db, "SELECT id FROM token WHERE token = '0'")
    assert (error.value.index, error.value.committed, error.value.existing_id) == (7, 4, first)
    assert value(db, "SELECT count(*) FROM tasks") == 4


@pytest.mark.parametrize("count", [3, 12_000])
def test_raise_at_a_twin_in_the_same_call(producer: Producer, db: psycopg.Connection, count: int) -> None:
    tasks = [Task("t", idempotency_token=f"{n % (count - 1)}", on_conflict="raise") for n in range(count)]
    with pytest.raises(DuplicateTask, match="an earlier task of the call") as error:
        producer.enqueue_many(tasks)
    assert (error.value.index, error.value.existing_id) == (count - 1, None)
    assert value(db, "SELECT count(*) FROM tasks") == 0


def test_calls_that_fly_together_are_refused_each_by_itself(producer: Producer, db: psycopg.Connection) -> None:
    known = producer.enqueue(Task("t", idempotency_token="x")).id

    async def all_at_once() -> list[Enqueued | BaseException]:
        calls = [
            producer.aenqueue(Task("t", n, idempotency_token="x" if n % 3 == 0 else f"{n}", on_conflict="raise"))
            for n in range(90)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    for n, result in enumerate(asyncio.run(all_at_once())):
        if n % 3 == 0:
            assert isinstance(result, DuplicateTask), n
            assert result.existing_id == known
        else:
            assert isinstance(result, Enqueued), n
            assert result.is_new
    assert value(db, "SELECT count(*) FROM tasks") == 61


def test_replace_changes_the_waiting_task(enqueue: Enqueue, client: Client) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    first = one(enqueue, {"n": 1})
    assert one(enqueue, {"n": 2}, on_conflict="replace") == (first.id, False)
    assert client.get_task(first.id).payload == {"n": 2}
    assert one(enqueue, b"3", on_conflict="replace", run_at=at) == (first.id, False)
    record = client.get_task(first.id)
    assert (record.payload, record.kind, record.run_at) == (b"3", "scheduled", at)
    assert one(enqueue, {"n": 4}, on_conflict="replace_time", delay=60) == (first.id, False)
    record = client.get_task(first.id)
    assert record.payload == b"3"
    assert record.run_at is not None
    assert record.run_at < at
    assert one(enqueue, {"n": 5}, on_conflict="replace_payload", run_at=at) == (first.id, False)
    assert (client.get_task(first.id).payload, client.get_task(first.id).run_at) == ({"n": 5}, record.run_at)
    assert one(enqueue, {"n": 6}) == (first.id, False)
    assert client.get_task(first.id).payload == {"n": 5}


def test_what_runs_or_has_ended_is_not_replaced(enqueue: Enqueue, client: Client, store: Session) -> None:
    worker = Worker(store, 1)
    first = one(enqueue, 1)
    [chunk] = [chunk for chunk in worker.claim(1) if chunk.lo == first.id]
    assert one(enqueue, 2, on_conflict="replace", delay=60) == (first.id, False)
    assert (client.get_task(first.id).state, client.get_task(first.id).payload) == ("running", 1)
    worker.complete({chunk.no: [first.id]})
    assert one(enqueue, 3, on_conflict="replace", delay=60) == (first.id, False)
    assert (client.get_task(first.id).state, client.get_task(first.id).payload) == ("completed", 1)


def test_the_last_of_a_call_wins(enqueue: Enqueue, client: Client) -> None:
    tasks = [Task("t", n, idempotency_token=f"{n % 3}", on_conflict="replace") for n in range(9)]
    results = enqueue(tasks)
    for n in range(3):
        assert [results[i].id for i in (n, n + 3, n + 6)] == [results[n].id] * 3
        assert client.get_task(results[n].id).payload == n + 6
    enqueue([Task("t", -n, idempotency_token=f"{n % 3}", on_conflict="replace", delay=60) for n in range(9)])
    for n in range(3):
        record = client.get_task(results[n].id)
        assert (record.payload, record.kind) == (-n - 6, "scheduled")


def test_many_are_replaced_in_chunks_and_later(producer: Producer, client: Client, db: psycopg.Connection) -> None:
    first = producer.enqueue_many(
        Task("t", 0, idempotency_token=f"{n}", delay=600 if n % 5 == 0 else None) for n in range(12_000)
    )
    changed = list(
        producer.enqueue_many(
            Task("t", n, idempotency_token=f"{n}", on_conflict="replace") for n in range(0, 12_000, 3)
        )
    )
    assert [result.id for result in changed] == [first[n].id for n in range(0, 12_000, 3)]
    payloads: dict[int, str] = dict(db.execute("SELECT id, payload FROM tasks").fetchall())
    assert len(payloads) == 12_000
    for n in range(12_000):
        assert payloads[first[n].id] == (str(n) if n % 3 == 0 else "0"), n
    assert client.counts()["pending"] == 12_000
