"""Tokens that are taken over, and tasks that are replaced, while others are at them: each order forced by a lock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest

from fastq import Client, DuplicateTask, Enqueued, Producer, Task
from tests.support.producing import Background, gather, value
from tests.support.storage import Leader, Session, Worker, in_background, wait_blocked
from tests.support.waiting import wait_until

OpenSession = Callable[[], Session]

TASK = Task("t", "new", idempotency_token="x", token_until="ended")


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def other(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture
def ended(producer: Producer, client: Client) -> int:
    """A task that has ended, and its token with it."""
    first = producer.enqueue(Task("t", "old", idempotency_token="x", token_until="ended"))
    client.cancel_task(first.id)
    return first.id


def is_waited_for(db: psycopg.Connection) -> bool:
    """Some backend waits for a row or transaction in a statement of this schema."""
    return bool(
        value(
            db,
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ILIKE '%' || current_schema() || '%'",
        )
    )


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_of_two_that_take_a_token_over_one_gets_it(
    producer: Producer, other: Producer, dsn: str, db: psycopg.Connection, ended: int, end: str
) -> None:
    with psycopg.connect(dsn) as connection:
        mine = producer.enqueue_tx(connection, TASK)
        assert mine.is_new
        late = Background(lambda: other.enqueue(TASK))
        wait_until(lambda: is_waited_for(db))
        assert not late.is_done
        getattr(connection, end)()
    result = late.result()
    assert result.id != ended
    assert (result == (mine.id, False)) == (end == "commit")
    assert result.is_new == (end == "rollback")
    assert value(db, "SELECT id FROM token") == result.id


def test_whose_the_token_is_is_decided_under_its_lock(
    producer: Producer, store: Session, db: psycopg.Connection, ended: int
) -> None:
    """The other takes it over between our look at the token and our lock: its task lives, though our first look knew nothing of it."""
    living = producer.enqueue(Task("t", "other")).id
    store.begin()
    store.sql("SELECT FROM fastq.token WHERE token = 'x' FOR UPDATE")
    late = Background(lambda: producer.enqueue(TASK))
    wait_until(lambda: is_waited_for(db))
    store.sql("UPDATE fastq.token SET id = %s WHERE token = 'x'".replace("%s", str(living)))
    store.commit()
    assert late.result() == (living, False)
    assert value(db, "SELECT id FROM token") == living != ended


def test_a_token_that_goes_while_it_is_waited_for_is_taken_anew(
    producer: Producer, store: Session, db: psycopg.Connection, ended: int
) -> None:
    store.begin()
    store.sql("SELECT FROM fastq.token WHERE token = 'x' FOR UPDATE")
    late = Background(lambda: producer.enqueue(TASK))
    wait_until(lambda: is_waited_for(db))
    store.sql("DELETE FROM fastq.token")
    store.commit()
    result = late.result()
    assert result.is_new
    assert result.id != ended
    assert value(db, "SELECT id FROM token") == result.id


def test_a_task_whose_completion_is_not_committed_still_has_its_token(
    producer: Producer, store: Session, db: psycopg.Connection
) -> None:
    worker = Worker(store, 1)
    first = producer.enqueue(TASK)
    [chunk] = worker.claim(1)
    store.begin()
    assert worker.complete({chunk.no: [first.id]}) == {}
    assert producer.enqueue(TASK) == (first.id, False), "and nobody waits for it"
    store.rollback()
    assert producer.enqueue(TASK) == (first.id, False)
    assert worker.complete({chunk.no: [first.id]}) == {}
    second = producer.enqueue(TASK)
    assert second.is_new
    assert value(db, "SELECT id FROM token") == second.id


def test_a_completion_while_the_token_is_looked_at_is_seen_or_not(
    producer: Producer, store: Session, open_session: OpenSession, db: psycopg.Connection
) -> None:
    """The completion commits while the enqueue waits for the token's lock: what decides is how it is then."""
    worker = Worker(store, 1)
    first = producer.enqueue(TASK)
    [chunk] = worker.claim(1)
    holder = open_session()
    holder.begin()
    holder.sql("SELECT FROM fastq.token WHERE token = 'x' FOR UPDATE")
    late = Background(lambda: producer.enqueue(TASK))
    wait_until(lambda: is_waited_for(db))
    assert worker.complete({chunk.no: [first.id]}) == {}
    holder.rollback()
    assert late.result().is_new


def test_upkeep_leaves_a_token_that_was_taken_over_meanwhile(
    producer: Producer, store: Session, open_session: OpenSession, dsn: str, db: psycopg.Connection
) -> None:
    producer.enqueue(TASK)
    db.execute("UPDATE token SET id = -1, created_at = created_at - interval '1 year'")
    leader = Leader(store)
    leader.tick()
    with psycopg.connect(dsn) as connection:
        mine = producer.enqueue_tx(connection, TASK)
        assert mine.is_new
        with in_background(store, lambda: leader.one("purge_tokens", 3600.0, "", "", 100)) as purge:
            wait_blocked(open_session(), store)
            connection.commit()
            assert purge.result(30)[0] == 0
    assert value(db, "SELECT id FROM token") == mine.id


def test_a_retry_of_the_old_task_while_its_token_goes(producer: Producer, client: Client, dsn: str, ended: int) -> None:
    with psycopg.connect(dsn) as connection:
        mine = producer.enqueue_tx(connection, TASK)
        assert client.retry_task(ended).state == "pending"
        connection.commit()
    assert producer.enqueue(TASK) == (mine.id, False)
    assert {client.get_task(id_).state for id_ in (ended, mine.id)} == {"pending"}


# --- conflicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_raise_waits_for_the_transaction_that_is_about_to_take_the_token(
    producer: Producer, other: Producer, dsn: str, db: psycopg.Connection, end: str
) -> None:
    task = Task("t", idempotency_token="x", on_conflict="raise")
    with psycopg.connect(dsn) as connection:
        mine = producer.enqueue_tx(connection, task)
        late = Background(lambda: other.enqueue(task))
        few = Background(lambda: other.enqueue_many([Task("t"), Task("t", idempotency_token="x", on_conflict="raise")]))
        wait_until(lambda: is_waited_for(db))
        getattr(connection, end)()
    if end == "commit":
        for call in (late, few):
            with pytest.raises(DuplicateTask) as error:
                call.result()
            assert error.value.existing_id == mine.id
        return
    outcomes = []
    for call in (late, few):
        try:
            call.result()
            outcomes.append(True)
        except DuplicateTask:
            outcomes.append(False)
    assert sorted(outcomes) == [False, True]


def test_a_duplicate_among_calls_that_fly_together_refuses_its_own_call_alone(
    producer: Producer, db: psycopg.Connection
) -> None:
    known = producer.enqueue(Task("t", idempotency_token="x")).id

    def call(n: int) -> Enqueued | DuplicateTask:
        last = Task("t", n, idempotency_token="x" if n % 4 == 0 else f"{n}", on_conflict="raise")
        try:
            return producer.enqueue_many([Task("t", n), last])[1]
        except DuplicateTask as error:
            return error

    results = gather([partial(call, n) for n in range(40)])
    refused = [result for result in results if isinstance(result, DuplicateTask)]
    assert [isinstance(result, DuplicateTask) for result in results] == [n % 4 == 0 for n in range(40)]
    assert {(error.existing_id, error.index) for error in refused} == {(known, 1)}
    assert value(db, "SELECT count(*) FROM tasks") == 1 + 2 * 30


def test_a_claim_in_flight_comes_before_a_replacement(
    producer: Producer, client: Client, store: Session, db: psycopg.Connection
) -> None:
    worker = Worker(store, 1)
    first = producer.enqueue(Task("t", "old", idempotency_token="x"))
    store.begin()
    [chunk] = worker.claim(1)
    late = Background(
        lambda: producer.enqueue(Task("t", "new", idempotency_token="x", on_conflict="replace", delay=60))
    )
    wait_until(lambda: is_waited_for(db))
    store.commit()
    assert late.result() == (first.id, False)
    record = client.get_task(first.id)
    assert (record.state, record.payload) == ("running", "old")
    assert worker.complete({chunk.no: [first.id]}) == {}


def test_a_claim_takes_what_was_replaced_as_it_is_then(
    producer: Producer, client: Client, store: Session, dsn: str
) -> None:
    worker = Worker(store, 1)
    first = producer.enqueue(Task("t", "old", idempotency_token="x"))
    with psycopg.connect(dsn) as connection:
        producer.enqueue_tx(connection, Task("t", "new", idempotency_token="x", on_conflict="replace"))
        assert worker.claim(1) == [], "its chunk is locked"
        assert client.get_task(first.id).payload == "old"
        connection.commit()
    assert [chunk.lo for chunk in worker.claim(1)] == [first.id]
    assert client.get_task(first.id).payload == "new"


def test_a_promotion_in_flight_comes_before_a_replacement(
    producer: Producer, client: Client, store: Session, open_session: OpenSession, db: psycopg.Connection
) -> None:
    first = producer.enqueue(Task("t", "old", idempotency_token="x", delay=60))
    db.execute("UPDATE delayed SET run_at = now()")
    leader = Leader(open_session())
    leader.tick()
    leader.session.begin()
    assert leader.run("promote_tasks", 100, 0)
    late = Background(lambda: producer.enqueue(Task("t", "new", idempotency_token="x", on_conflict="replace")))
    wait_until(lambda: is_waited_for(db))
    leader.session.commit()
    assert late.result() == (first.id, False)
    record = client.get_task(first.id)
    assert (record.state, record.kind, record.payload) == ("pending", None, "new")


@pytest.mark.parametrize("conflict", ["existing", "replace"])
def test_loads_that_take_tokens_over_in_any_order_all_succeed(
    producer: Producer, other: Producer, client: Client, db: psycopg.Connection, conflict: str
) -> None:
    tokens = [f"{n:04}" for n in range(2_000)]

    def load(which: Producer, seed: int) -> list[Enqueued]:
        mine = tokens[:]
        random.Random(seed).shuffle(mine)
        tasks = (
            Task("t", seed, idempotency_token=token, token_until="ended", on_conflict=conflict)  # type: ignore[arg-type]
            for token in mine[:1_500]
        )
        results = which.enqueue_many(tasks, commit_every=None if seed % 2 else 400)
        return [result for _, result in sorted(zip(mine[:1_500], results, strict=True))]

    producer.enqueue_many(
        Task("t", -1, idempotency_token=token, token_until="ended") for token in tokens[: len(tokens) // 2]
    )
    client.cancel_tasks(states=["pending"])
    results = gather([partial(load, which, seed) for seed, which in enumerate([producer, other] * 3)], timeout=120)
    fresh = [result.id for each in results for result in each if result.is_new]
    # Those that no load wanted are still with the old tasks.
    held = db.execute("SELECT k.id FROM token k JOIN tasks t USING (id) WHERE t.state = 'pending'").fetchall()
    assert len(fresh) == len(set(fresh)) == len(held)
    assert set(fresh) == {row[0] for row in held}
    assert client.counts()["pending"] == len(fresh)
