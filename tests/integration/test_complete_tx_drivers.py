"""A task that is completed in its handler's own transaction: what must hold on every driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from django.db import connections, transaction
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastq import CompletionError, Consumer, Producer, Task, TaskInfo
from tests.support.consuming import errors, new_consumer, wait_for_states
from tests.support.producing import value
from tests.support.puppets import Puppet
from tests.support.users import USERS, DjangoUser, User, asyncpg_words, user_of
from tests.support.waiting import wait_until


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def effects(db: psycopg.Connection, migrated: str) -> Callable[[], int]:
    """Counts what handlers wrote into a table of their own."""
    db.execute("CREATE TABLE effect (id bigint)")
    return lambda: int(value(db, "SELECT count(*) FROM effect"))


@pytest.fixture
def insert(effects: Callable[[], int], db: psycopg.Connection) -> str:
    """A handler's statement."""
    assert effects() == 0
    return str(value(db, "SELECT format('INSERT INTO %I.effect VALUES (1)', current_schema())"))


@pytest.fixture
def puppet(dsn: str, migrated: str) -> Iterator[Puppet]:
    """Handles type t, in a consumer that runs."""
    with ExitStack() as stack:
        consumer = new_consumer(dsn, migrated)
        handler = Puppet(consumer)
        consumer.start()
        stack.callback(handler.stop)
        yield handler


@pytest.fixture(params=USERS, ids=lambda kind: kind.name)
def user(request: pytest.FixtureRequest, producer: Producer, dsn: str) -> Iterator[User]:
    with user_of(request.param, producer, dsn) as made:
        yield made


def stats(consumer: Consumer) -> dict[str, float]:
    counted = consumer.stats()
    return {name: counted[name] for name in ("completed", "retried", "failed", "refused")}


def test_what_the_handler_wrote_and_the_completion_come_together(
    user: User,
    producer: Producer,
    puppet: Puppet,
    db: psycopg.Connection,
    insert: str,
    effects: Callable[[], int],
) -> None:
    producer.enqueue(Task("t"))
    run = puppet.next()
    user.execute(insert)
    user.complete(run.task)
    assert effects() == 0
    wait_for_states(db, {"running": 1})
    user.commit()
    # At once, not when the handler ends.
    wait_for_states(db, {"completed": 1})
    assert effects() == 1
    run.end()
    wait_until(lambda: stats(puppet.consumer)["completed"] == 1)
    puppet.consumer.stop()
    assert stats(puppet.consumer) == {"completed": 1, "retried": 0, "failed": 0, "refused": 0}
    [(took_us, attempts)] = db.execute("SELECT took_us, attempts FROM done").fetchall()
    assert took_us > 0
    assert attempts == 1
    wait_for_states(db, {"completed": 1})
    assert value(db, "SELECT count(*) FROM claim") == 0


def test_what_is_rolled_back_runs_again_and_counts_once(
    user: User,
    producer: Producer,
    puppet: Puppet,
    db: psycopg.Connection,
    insert: str,
    effects: Callable[[], int],
) -> None:
    producer.enqueue(Task("t"))
    first = puppet.next()
    user.execute(insert)
    user.complete(first.task)
    user.rollback()
    first.end(ValueError("no"))
    second = puppet.next()
    assert second.task.attempt == 2
    user.execute(insert)
    user.complete(second.task)
    user.commit()
    second.end()
    wait_for_states(db, {"completed": 1})
    wait_until(lambda: stats(puppet.consumer)["completed"] == 1)
    assert stats(puppet.consumer) == {"completed": 1, "retried": 1, "failed": 0, "refused": 0}
    assert effects() == 1
    assert [error for _, error, _ in errors(db)] == ["ValueError: no"]


def test_a_savepoint_that_is_rolled_back_takes_the_completion_with_it(
    user: User,
    producer: Producer,
    puppet: Puppet,
    db: psycopg.Connection,
    insert: str,
    effects: Callable[[], int],
) -> None:
    producer.enqueue(Task("t"))
    run = puppet.next()
    user.execute(insert)
    user.execute("SAVEPOINT mine")
    user.complete(run.task)
    user.execute("ROLLBACK TO SAVEPOINT mine")
    user.execute("SAVEPOINT mine")
    user.complete(run.task)
    user.execute("RELEASE SAVEPOINT mine")
    user.commit()
    wait_for_states(db, {"completed": 1})
    run.end()
    wait_until(lambda: stats(puppet.consumer)["completed"] == 1)
    assert effects() == 1
    assert errors(db) == []


def test_sync_and_async_connections_are_not_mixed_up(user: User, producer: Producer, puppet: Puppet) -> None:
    producer.enqueue(Task("t"))
    task = puppet.next().task
    target: Any = user.target()
    if user.is_async:
        with pytest.raises(TypeError, match=r"needs a sync connection .*await task\.acomplete_tx.*complete_tx"):
            task.complete_tx(target)
    else:
        with pytest.raises(TypeError, match=r"needs an async connection .*complete_tx, in its thread"):
            user.do(lambda: user.wait(task.acomplete_tx(target)))


# --- in the handlers themselves --------------------------------------------------------------------


def test_a_sync_handler_with_a_connection_of_its_own(
    dsn: str, migrated: str, producer: Producer, db: psycopg.Connection, insert: str, effects: Callable[[], int]
) -> None:
    def handle(task: TaskInfo) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute(insert.encode())
            task.complete_tx(conn)

    consumer = new_consumer(dsn, migrated)
    consumer.add_handler("t", handle)
    producer.enqueue_many(Task("t", n) for n in range(100))
    consumer.start()
    wait_for_states(db, {"completed": 100})
    consumer.stop()
    assert effects() == 100
    assert stats(consumer) == {"completed": 100, "retried": 0, "failed": 0, "refused": 0}
    assert value(db, "SELECT sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)) FROM done") == 100


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_handler_with_a_connection_of_its_own(
    dsn: str,
    migrated: str,
    producer: Producer,
    db: psycopg.Connection,
    insert: str,
    effects: Callable[[], int],
    driver: str,
) -> None:
    async def by_psycopg(task: TaskInfo) -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await conn.execute(insert.encode())
            await task.acomplete_tx(conn)
            if task.attempt == 1 and task.payload % 3 == 0:
                raise ValueError("no")

    async def by_asyncpg(task: TaskInfo) -> None:
        conn = await asyncpg.connect(**asyncpg_words(dsn))
        try:
            async with conn.transaction():
                await conn.execute(insert)
                await task.acomplete_tx(conn)
                if task.attempt == 1 and task.payload % 3 == 0:
                    raise ValueError("no")
        finally:
            await conn.close()

    consumer = new_consumer(dsn, migrated, concurrency=8)
    consumer.add_handler("t", by_psycopg if driver == "psycopg" else by_asyncpg)
    producer.enqueue_many(Task("t", n) for n in range(60))
    consumer.start()
    wait_for_states(db, {"completed": 60}, timeout=60)
    consumer.stop()
    assert effects() == 60
    assert stats(consumer) == {"completed": 60, "retried": 20, "failed": 0, "refused": 0}


# --- without a transaction -------------------------------------------------------------------------


def test_autocommit_without_a_transaction_is_refused(
    dsn: str, producer: Producer, puppet: Puppet, db: psycopg.Connection
) -> None:
    producer.enqueue(Task("t"))
    run = puppet.next()
    with psycopg.connect(dsn, autocommit=True) as conn:
        with pytest.raises(CompletionError, match=r"autocommit.*whatever becomes of your statements: begin one"):
            run.task.complete_tx(conn)
        with conn.pipeline(), pytest.raises(CompletionError, match=r"pipeline mode.*complete_tx outside of it"):
            run.task.complete_tx(conn)

    async def by_asyncpg() -> None:
        conn = await asyncpg.connect(**asyncpg_words(dsn))
        with pytest.raises(CompletionError, match=r"autocommit.*async with conn\.transaction"):
            await run.task.acomplete_tx(conn)
        await conn.close()

    asyncio.run(by_asyncpg())
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool)
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(CompletionError, match=r"autocommit.*engine\.begin"),
    ):
        run.task.complete_tx(connection)

    # None of that was for good: the handler goes on, and returns.
    run.end()
    wait_for_states(db, {"completed": 1})
    wait_until(lambda: stats(puppet.consumer)["completed"] == 1)
    assert stats(puppet.consumer) == {"completed": 1, "retried": 0, "failed": 0, "refused": 0}


def test_django_outside_of_atomic_is_refused(
    dsn: str, producer: Producer, puppet: Puppet, db: psycopg.Connection
) -> None:
    producer.enqueue(Task("t"))
    run = puppet.next()
    with user_of(DjangoUser, producer, dsn) as user:

        def outside() -> None:
            transaction.get_connection().set_rollback(True)
            user._atomic.__exit__(None, None, None)  # type: ignore[attr-defined]
            try:
                with pytest.raises(CompletionError, match=r"autocommit.*transaction\.atomic"):
                    run.task.complete_tx(connections["default"])
            finally:
                user._begin()  # type: ignore[attr-defined]

        user.do(outside)
        user.complete(run.task)
        user.commit()
    run.end()
    wait_for_states(db, {"completed": 1})


def test_other_kinds_of_databases_and_loops_are_refused(
    dsn: str, producer: Producer, puppet: Puppet, db: psycopg.Connection
) -> None:
    producer.enqueue(Task("t"))
    run = puppet.next()
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(CompletionError, match="sqlite, not to PostgreSQL"):
        run.task.complete_tx(connection)
    engine.dispose()
    for wrong in (None, 7, "postgresql://host"):
        with pytest.raises(TypeError, match="a connection is wanted"):
            run.task.complete_tx(wrong)

    async def on_a_loop() -> None:
        with closing(psycopg.connect(dsn)) as conn, pytest.raises(CompletionError, match=r"use `await task\.acomplete"):
            run.task.complete_tx(conn)
        words = asyncpg_words(dsn)
        other = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**words), poolclass=NullPool
        )
        async with other.begin() as connection:
            await run.task.acomplete_tx(connection)
        await other.dispose()

    asyncio.run(on_a_loop())
    wait_for_states(db, {"completed": 1})
    run.end()
