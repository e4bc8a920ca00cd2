"""`expires_at`: no run starts after it, and who was not started in time ends as expired, claimed or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from fastq import AsyncClient, Client, ConstantBackoff, Snooze, Task, TaskFailed, TaskInfo
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.lab import Lab
from tests.support.waiting import wait_until


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as made:
        yield made


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as made:
        yield made


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_task_keeps_its_time_however_it_is_enqueued(lab: Lab, client: Client) -> None:
    """In chunks of their own: what never expires pays nothing."""
    producer, at = lab.producer, soon(3600)
    dated = [
        producer.enqueue(Task("t", 1, expires_at=at)).id,
        producer.enqueue(Task("t", 2, expires_at=at, delay=60)).id,
    ]
    mixed = [
        Task("t", n, expires_at=at if n % 3 == 0 else None, delay=60 if n % 5 == 0 else None) for n in range(3_000)
    ]
    results = [result.id for result in producer.enqueue_many(mixed)]
    with psycopg.connect(lab.dsn) as conn:
        dated.append(producer.enqueue_tx(conn, Task("t", expires_at=at)).id)
        small = [Task("t", n, expires_at=at if n % 2 else None, delay=60 if n % 3 else None) for n in range(12)]
        results += [result.id for result in producer.enqueue_many_tx(conn, small)]
        results += [result.id for result in producer.enqueue_many_tx(conn, mixed)]
    for id_, task in zip(results, mixed + small + mixed, strict=True):
        if task.expires_at is not None:
            dated.append(id_)
    page = client.list_tasks(order_by="id", limit=10_000)
    assert sorted(task.id for task in page if task.expires_at == at) == sorted(dated)
    assert {task.expires_at for task in page} == {at, None}
    assert client.get_task(dated[0]).expires_at == at
    assert client.get_task(dated[1]).expires_at == at
    wrong = lab.value(
        "SELECT count(*) FROM ready r, task t WHERE t.leaf = r.leaf AND t.id BETWEEN r.lo AND r.hi "
        "AND t.expires_at IS DISTINCT FROM r.expires_at"
    )
    assert wrong == 0


@pytest.mark.parametrize("plain", [True, False])
def test_a_call_of_many_goes_in_at_once(lab: Lab, plain: bool) -> None:
    """What expires, what waits and what is copied: three statements, one transaction."""
    at = soon(3600)
    tasks = [Task("t", n, expires_at=at) for n in range(300)]
    tasks += [Task("t", n, expires_at=at, delay=60) for n in range(300)]
    tasks += [Task("t", n) for n in range(300) if plain]
    lab.producer.enqueue_many(tasks)
    assert lab.value("SELECT count(*) FROM delayed") == 300
    assert lab.value("SELECT count(*) FROM task") == len(tasks) - 300
    transactions = lab.value(
        "SELECT count(DISTINCT xmin::text) "
        "FROM (SELECT xmin FROM task UNION ALL SELECT xmin FROM ready UNION ALL SELECT xmin FROM delayed) w"
    )
    assert transactions == 1


def test_a_replaced_task_keeps_its_time(lab: Lab, client: Client) -> None:
    """Its own, not that of the chunk in which it lay."""
    first, second = soon(1800), soon(3600)
    with psycopg.connect(lab.dsn) as conn:
        tasks = [Task("t", n, expires_at=first if n == 0 else second) for n in range(10)]
        lab.producer.enqueue_many_tx(conn, tasks)
    id_ = lab.producer.enqueue(Task("t", "held", expires_at=second, idempotency_token="a")).id
    # As a claim that is given back leaves it: with the time of the first of its claim.
    lab.db.execute("UPDATE ready SET expires_at = %s WHERE %s BETWEEN lo AND hi", (first, id_))
    again = Task("t", "new", delay=60, idempotency_token="a", on_conflict="replace", expires_at=soon(7200))
    assert lab.producer.enqueue(again).id == id_
    record = client.get_task(id_)
    assert (record.payload, record.kind, record.expires_at) == ("new", "scheduled", second)
    assert lab.value("SELECT expires_at FROM delayed WHERE id = %s", id_) == second


def test_waiting_for_a_result_ends_with_the_time(lab: Lab, client: Client) -> None:
    id_ = lab.producer.enqueue(Task("other", 1, expires_at=soon(-1))).id
    lab.consumer()
    with pytest.raises(TaskFailed) as caught:
        client.wait(id_, timeout=30)
    assert (caught.value.task.state, caught.value.task.id) == ("expired", id_)


def test_an_expired_task_frees_a_token_that_is_held_until_then(lab: Lab) -> None:
    task = Task("other", 1, expires_at=soon(-1), idempotency_token="a", token_until="ended")
    first = lab.producer.enqueue(task)
    assert not lab.producer.enqueue(task).is_new
    lab.consumer()
    wait_for_states(lab.db, {"expired": 1})
    again = lab.producer.enqueue(Task("other", 2, idempotency_token="a", token_until="ended"))
    assert again.is_new
    assert again.id != first.id


@pytest.mark.asyncio
async def test_async_code_sees_it_too(lab: Lab) -> None:
    at = soon(3600)
    id_ = (await lab.producer.aenqueue(Task("other", 1, expires_at=at))).id
    async with AsyncClient(lab.dsn, schema=lab.schema) as client:
        assert (await client.get_task(id_)).expires_at == at
        assert [task.expires_at for task in await client.list_tasks()] == [at]
        assert (await client.edit_task(id_, delay=60)).expires_at == at
        assert (await client.cancel_task(id_)).expires_at == at


def test_a_claim_runs_none_whose_time_is_over(lab: Lab, client: Client) -> None:
    """In one chunk with others. The leader is not asked: no consumer leads."""
    started: list[int] = []
    times = [None if n % 3 == 0 else soon(3600) if n % 3 == 1 else soon(-1) for n in range(60)]
    ids = [result.id for result in lab.producer.enqueue_many(Task("t", n, expires_at=at) for n, at in enumerate(times))]
    lab.db.execute("INSERT INTO leader (holder, term, expires_at) VALUES (1, 1, now() + interval '1 hour')")
    lab.consumer(lambda task: started.append(task.id))
    wait_for_states(lab.db, {"completed": 40, "expired": 20})
    over = [id_ for id_, at in zip(ids, times, strict=True) if at is not None and at < datetime.now(UTC)]
    assert sorted(started) == sorted(set(ids) - set(over))
    record = client.get_task(over[0])
    assert (record.state, record.attempts, record.payload) == ("expired", 0, 2)
    assert record.ended_at is not None
    assert lab.value("SELECT count(*) FROM claim") == 0


def test_what_nobody_claims_is_ended_by_the_leader(lab: Lab) -> None:
    """In chunks, of which it leaves what is not over, and among what waits for its time."""
    times = [soon(3600) if n % 2 else soon(0.5) for n in range(700)]
    lab.producer.enqueue_many([Task("other", n, expires_at=at) for n, at in enumerate(times)])
    lab.producer.enqueue_many([Task("other", n, expires_at=at, delay=3600) for n, at in enumerate(times)])
    lab.enqueue_others(*range(50))
    before = lab.value("SELECT count(DISTINCT rid) FROM ready")
    lab.consumer()
    wait_for_states(lab.db, {"pending": 750, "expired": 700})
    assert lab.value("SELECT count(*) FROM ready r WHERE r.expires_at < now()") == 0
    assert lab.value("SELECT sum(hi - lo + 1) FROM ready") == 400
    assert lab.value("SELECT count(DISTINCT rid) FROM ready") <= before
    assert lab.value("SELECT count(*) FROM dead WHERE octet_length(payload) = 0") == 0


def test_what_was_claimed_in_advance_is_not_started_late(lab: Lab, client: Client) -> None:
    started: list[object] = []
    release = threading.Event()

    def note(task: TaskInfo) -> None:
        started.append(task.payload)
        if task.payload == "hold":
            assert release.wait(60)

    consumer = new_consumer(lab.dsn, lab.schema, concurrency=1)
    consumer.handler("t")(note)
    # Of a type that has been quick so far more is claimed than there are slots.
    lab.enqueue(*range(500), "hold")
    at = soon(12)
    id_ = lab.producer.enqueue(Task("t", "late", expires_at=at)).id
    consumer.start()
    try:
        wait_until(lambda: started[-1:] == ["hold"], message="the slot is taken")
        # Else it might expire where it waits.
        wait_until(lambda: id_ in lab.claimed(lab.consumer_id()), message="it is claimed, too")
        assert lab.value("SELECT clock_timestamp() < %s", at)
        wait_until(lambda: lab.value("SELECT clock_timestamp() > %s", at), message="the time is over")
        release.set()
        wait_until(lambda: client.get_task(id_).state == "expired", message="it has expired")
    finally:
        release.set()
        consumer.stop()
    assert started[-1:] == ["hold"]


def test_async_handlers_start_none_late(lab: Lab) -> None:
    started: list[int] = []

    async def note(task: TaskInfo) -> None:
        started.append(task.id)

    lab.db.execute("INSERT INTO leader (holder, term, expires_at) VALUES (1, 1, now() + interval '1 hour')")
    lab.producer.enqueue_many([Task("t", n, expires_at=soon(-1)) for n in range(20)])
    good = lab.enqueue(*range(5))
    lab.consumer(note)
    wait_for_states(lab.db, {"completed": 5, "expired": 20})
    assert sorted(started) == good


def test_a_retry_and_a_snooze_are_runs_too(lab: Lab, client: Client) -> None:
    """Whose time is over while they wait."""
    runs: list[object] = []

    def fail(task: TaskInfo) -> None:
        runs.append(task.payload)
        if task.payload == "snooze":
            raise Snooze(3600)
        raise ValueError

    at = soon(3600)
    ids = [lab.producer.enqueue(Task("t", word, expires_at=at)).id for word in ("retry", "snooze")]
    lab.consumer(fail, retry_policy=ConstantBackoff(3600))
    wait_until(lambda: sorted(map(str, runs)) == ["retry", "snooze"], message="both ran")
    wait_until(lambda: lab.value("SELECT count(*) FROM delayed WHERE expires_at = %s", at) == 2, message="both wait")
    lab.db.execute("UPDATE delayed SET expires_at = now()")
    lab.db.execute("UPDATE task SET expires_at = now()")
    wait_for_states(lab.db, {"expired": 2})
    assert [client.get_task(id_).attempts for id_ in ids] == [1, 0]
    assert len(runs) == 2
    # Its time is over and no longer counts.
    assert client.retry_task(ids[0]).expires_at is None
    wait_until(lambda: len(runs) == 3, message="it runs again")


def test_what_is_given_back_keeps_its_time(lab: Lab, client: Client) -> None:
    started, release = threading.Event(), threading.Event()

    def hold(_: TaskInfo) -> None:
        started.set()
        assert release.wait(60)

    at = soon(3600)
    consumer = new_consumer(lab.dsn, lab.schema, concurrency=1)
    consumer.handler("t")(hold)
    ids = [result.id for result in lab.producer.enqueue_many(Task("t", n, expires_at=at) for n in range(5))]
    consumer.start()
    assert started.wait(20)
    stop = threading.Thread(target=consumer.stop)
    stop.start()
    try:
        wait_until(lambda: lab.value("SELECT sum(hi - lo + 1) FROM ready") == 4, message="the others are given back")
    finally:
        release.set()
        stop.join()
    assert lab.value("SELECT sum(hi - lo + 1) FROM ready WHERE expires_at = %s", at) == 4
    assert client.get_task(ids[4]).expires_at == at


def test_expired_tasks_are_forgotten_before_failed_ones(lab: Lab) -> None:
    lab.producer.enqueue_many([Task("other", n, expires_at=soon(-1)) for n in range(5)])

    def fail(_: TaskInfo) -> None:
        raise ValueError

    lab.enqueue(1, max_attempts=1)
    lab.consumer(fail, expired_retention=1, completed_retention=1)
    wait_until(lambda: lab.value("SELECT count(*) FROM ready") == 0, message="they have expired")
    wait_until(
        lambda: lab.value("SELECT array_agg(state) FROM dead") == ["failed"], message="the failed one alone is kept"
    )
