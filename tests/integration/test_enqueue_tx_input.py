"""Connections and tasks that are not taken, settings of connections that must not matter, calls that are cut short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from psycopg import adapters
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import make_conninfo
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from fastq import EnqueueError, PayloadError, Producer, SettingsError, Task
from tests.support.producing import check_chunks, count, stored, value
from tests.support.users import AsyncpgUser, AsyncPsycopgUser, DjangoUser, PsycopgUser, User, asyncpg_words, user_of
from tests.support.waiting import wait_until_async


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


# --- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("conn", [None, "postgresql://host", 7, object(), sa.MetaData()])
def test_what_is_no_connection_is_refused_with_what_is_taken(producer: Producer, conn: object) -> None:
    with pytest.raises(
        TypeError, match=r"a connection is wanted, not .*; what is taken: a psycopg 3 Connection, .*asyncpg"
    ):
        producer.enqueue_tx(conn, Task("a"))
    with pytest.raises(TypeError, match="a connection is wanted"):
        producer.enqueue_many_tx(conn, [])
    with pytest.raises(TypeError, match="a connection is wanted"):
        asyncio.run(producer.aenqueue_tx(conn, Task("a")))
    with pytest.raises(TypeError, match="a connection is wanted"):
        asyncio.run(producer.aenqueue_many_tx(conn, []))


def test_another_kind_of_database_is_refused(producer: Producer) -> None:
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(EnqueueError, match="sqlite, not to PostgreSQL"):
        producer.enqueue_tx(connection, Task("a"))
    engine.dispose()


def test_a_sync_connection_over_an_async_driver_is_refused(producer: Producer, dsn: str) -> None:
    async def run() -> None:
        words = asyncpg_words(dsn)
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**words), poolclass=NullPool
        )
        async with engine.connect() as connection:
            with pytest.raises(EnqueueError, match="event loop"):
                await connection.run_sync(lambda sync: producer.enqueue_tx(sync, Task("a")))
        await engine.dispose()

    asyncio.run(run())


def test_another_database_is_refused(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    with psycopg.connect(make_conninfo(dsn, dbname="postgres")) as connection:
        for _ in range(2):
            with pytest.raises(EnqueueError, match="another server or database"):
                producer.enqueue_tx(connection, Task("a"))
    assert count(db) == 0


def test_autocommit_without_a_transaction_is_refused(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        with pytest.raises(EnqueueError, match=r"autocommit.*begin one.*conn.transaction.*enqueue"):
            producer.enqueue_tx(connection, Task("a"))
        with connection.transaction():
            producer.enqueue_tx(connection, Task("a"))
            assert count(db) == 0
        assert count(db) == 1
        connection.execute("BEGIN")
        producer.enqueue_tx(connection, Task("a"))
        connection.execute("ROLLBACK")
    assert count(db) == 1


def test_autocommit_of_asyncpg_is_refused(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(**asyncpg_words(dsn))
        with pytest.raises(EnqueueError, match="autocommit"):
            await producer.aenqueue_tx(connection, Task("a"))
        async with connection.transaction():
            await producer.aenqueue_tx(connection, Task("a"))
        await connection.close()

    asyncio.run(run())
    assert count(db) == 1


def test_autocommit_of_sqlalchemy_is_refused(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool)
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(EnqueueError, match=r"autocommit.*engine\.begin"),
    ):
        producer.enqueue_tx(connection, Task("a"))
    with engine.begin() as connection:
        producer.enqueue_tx(connection, Task("a"))
    with engine.connect() as connection:
        # Its first statement begins a transaction, as any other would.
        producer.enqueue_tx(connection, Task("a"))
        assert connection.in_transaction()
        connection.commit()
    with engine.connect() as connection:
        producer.enqueue_tx(connection, Task("a"))  # not committed
    engine.dispose()
    assert count(db) == 2


def test_autocommit_of_django_is_refused(producer: Producer, dsn: str) -> None:
    with user_of(DjangoUser, producer, dsn) as user:

        def outside() -> None:
            user._atomic.__exit__(None, None, None)  # type: ignore[attr-defined]
            try:
                with pytest.raises(EnqueueError, match=r"autocommit.*atomic"):
                    producer.enqueue_tx(user.target(), Task("a"))
                user.connection.set_autocommit(False)  # type: ignore[attr-defined]
                assert producer.enqueue_tx(user.target(), Task("a")).is_new
                user.connection.rollback()  # type: ignore[attr-defined]
                user.connection.set_autocommit(True)  # type: ignore[attr-defined]
            finally:
                user._begin()  # type: ignore[attr-defined]

        user.do(outside)


def test_django_errors_are_djangos(producer: Producer, dsn: str) -> None:
    from django.db import OperationalError  # noqa: PLC0415 - after it was configured

    with user_of(DjangoUser, producer, dsn) as first, user_of(DjangoUser, producer, dsn) as second:
        first.enqueue(Task("a", idempotency_token="t"))
        second.execute("SET LOCAL lock_timeout = '50ms'")
        with pytest.raises(OperationalError) as caught:
            second.enqueue(Task("a", idempotency_token="t"))
        assert isinstance(caught.value.__cause__, psycopg.errors.LockNotAvailable)


def test_a_pipeline_is_refused(producer: Producer, dsn: str) -> None:
    with psycopg.connect(dsn) as connection, connection.pipeline(), pytest.raises(EnqueueError, match="pipeline"):
        producer.enqueue_tx(connection, Task("a"))


def test_a_closed_connection_is_the_drivers_error(producer: Producer, dsn: str) -> None:
    connection = psycopg.connect(dsn)
    connection.close()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        producer.enqueue_tx(connection, Task("a"))


def test_scoped_sessions_are_taken(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool)
    scoped: scoped_session[Session] = scoped_session(sessionmaker(engine))
    producer.enqueue_tx(scoped, Task("a"))
    scoped.commit()
    scoped.remove()
    engine.dispose()

    async def run() -> None:
        words = asyncpg_words(dsn)
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**words), poolclass=NullPool
        )
        made: async_sessionmaker[AsyncSession] = async_sessionmaker(engine)
        scoped = async_scoped_session(made, scopefunc=asyncio.current_task)
        await producer.aenqueue_tx(scoped, Task("a"))
        await scoped.commit()
        await scoped.remove()
        await engine.dispose()

    asyncio.run(run())
    assert count(db) == 2


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "a", {"type": "a"}, [Task("a")]])
def test_what_is_no_task_is_refused(producer: Producer, dsn: str, task: Any) -> None:
    with psycopg.connect(dsn) as connection:
        with pytest.raises(TypeError, match=r"a fastq\.Task is wanted"):
            producer.enqueue_tx(connection, task)
        with pytest.raises(TypeError, match=r"a fastq\.Task is wanted"):
            asyncio.run(producer.aenqueue_tx(connection, task))
        with pytest.raises((TypeError, EnqueueError), match=r"an iterable of fastq\.Task is wanted|task 0: this is no"):
            producer.enqueue_many_tx(connection, [task] if task.__class__ is list else task)  # type: ignore[list-item]
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (Task("a", object()), PayloadError),
        (Task("a", float("nan")), PayloadError),
        (Task("a", b"x" * (1024 * 1024 + 1)), PayloadError),
        (Task(""), EnqueueError),
        (Task("a" * 256), EnqueueError),
        (Task("a\0b"), EnqueueError),
        (Task("\ud800"), EnqueueError),
        (Task("a", queue=""), EnqueueError),
        (Task("a", idempotency_token=""), EnqueueError),
        (Task("a", idempotency_token="x" * 256), EnqueueError),
        (Task("a", idempotency_token=7), EnqueueError),  # type: ignore[arg-type]
    ],
)
def test_a_task_that_can_not_be_enqueued_is_refused_before_anything_is_sent(
    producer: Producer, dsn: str, task: Task, error: type[Exception]
) -> None:
    with psycopg.connect(dsn) as connection:
        with pytest.raises(error):
            producer.enqueue_tx(connection, task)
        with pytest.raises(error, match="task 1:"):
            producer.enqueue_many_tx(connection, [Task("a"), task])
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_options_have_their_types(producer: Producer, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        with pytest.raises(SettingsError, match="notify is 'yes'"):
            producer.enqueue_tx(connection, Task("a"), notify="yes")  # type: ignore[arg-type]
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_closed_producer_and_a_running_loop_are_refused(dsn: str, migrated: str) -> None:
    with Producer(dsn, schema=migrated) as producer, psycopg.connect(dsn) as connection:

        async def run() -> None:
            with pytest.raises(EnqueueError, match="aenqueue_tx"):
                producer.enqueue_tx(connection, Task("a"))
            with pytest.raises(EnqueueError, match="aenqueue_many_tx"):
                producer.enqueue_many_tx(connection, [Task("a")])

        asyncio.run(run())
        producer.close()
        with pytest.raises(EnqueueError, match="closed"):
            producer.enqueue_tx(connection, Task("a"))


def test_async_iterables(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    async def tasks() -> AsyncIterator[Task]:
        for n in range(60):
            await asyncio.sleep(0)
            yield Task("a", n)

    with psycopg.connect(dsn) as connection, pytest.raises(TypeError, match="an iterable"):
        producer.enqueue_many_tx(connection, tasks())  # type: ignore[arg-type]
    with user_of(AsyncpgUser, producer, dsn) as user:
        answers = user.do(lambda: user.wait(producer.aenqueue_many_tx(user.target(), tasks())))
        user.commit()
    found = stored(db)
    assert [found[answer.id].payload for answer in answers] == [str(n) for n in range(60)]


# --- settings of connections ---------------------------------------------------------------------


class _Wrong(Dumper):
    def dump(self, obj: object) -> bytes:
        return b"boom"


class _Spoiled(Loader):
    def load(self, data: object) -> str:
        return "boom"


def _raise(*args: object) -> Any:
    raise AssertionError("the user's own factory was asked")


@pytest.mark.parametrize("threshold", [0, None])
def test_psycopgs_adapters_factories_and_settings_do_not_matter(
    producer: Producer, dsn: str, db: psycopg.Connection, threshold: int | None
) -> None:
    with psycopg.connect(dsn, client_encoding="latin1", prepare_threshold=threshold) as connection:
        for class_ in (str, bytes, int, list, float, tuple, type(None), datetime):
            connection.adapters.register_dumper(class_, _Wrong)
        for name in ("int8", "text", "bytea", "refcursor", "int4", "int2"):
            connection.adapters.register_loader(adapters.types[name].oid, _Spoiled)
        connection.row_factory = _raise
        connection.cursor_factory = psycopg.ClientCursor
        held = producer.enqueue(Task("a", idempotency_token="ü"))
        [answer, *_] = [producer.enqueue_tx(connection, Task("a", {"x": "€"}, delay=1)) for _ in range(7)]
        many = producer.enqueue_many_tx(connection, [Task("a", "€", idempotency_token=f"ü{n}") for n in range(100)])
        assert producer.enqueue_tx(connection, Task("a", idempotency_token="ü")) == (held.id, False)
        assert connection.row_factory is _raise
        assert connection.cursor_factory is psycopg.ClientCursor
        assert connection.prepare_threshold == threshold
        connection.commit()
    assert stored(db)[answer.id].payload == '{"x":"€"}'
    assert stored(db)[many[99].id].payload == '"€"'
    assert value(db, "SELECT count(*) FROM token WHERE token LIKE 'ü%'") == 101
    check_chunks(db)


class _Record(asyncpg.Record):  # type: ignore[misc]
    def __getitem__(self, key: object) -> Any:
        return _raise()


@pytest.mark.parametrize("cache", [0, 100])
def test_asyncpgs_codecs_records_and_settings_do_not_matter(
    producer: Producer, dsn: str, db: psycopg.Connection, cache: int
) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(
            **asyncpg_words(dsn), statement_cache_size=cache, record_class=_Record, command_timeout=20
        )
        for name in ("int2", "int4", "int8", "text", "bytea", "float8", "timestamptz", "varchar", "oid", "name"):
            await connection.set_type_codec(
                name, schema="pg_catalog", encoder=lambda _: "boom", decoder=lambda _: "boom", format="text"
            )
        async with connection.transaction():
            held = await producer.aenqueue(Task("a", idempotency_token="ü"))
            for _ in range(3):
                assert (await producer.aenqueue_tx(connection, Task("a", {"x": "€"}, delay=1))).is_new
            await producer.aenqueue_many_tx(connection, [Task("a", idempotency_token=f"ü{n}") for n in range(100)])
            assert await producer.aenqueue_tx(connection, Task("a", idempotency_token="ü")) == (held.id, False)
        await connection.close()

    asyncio.run(run())
    assert count(db) == 104
    assert value(db, "SELECT count(*) FROM token WHERE token LIKE 'ü%'") == 101
    check_chunks(db)


# --- calls that are cut short --------------------------------------------------------------------


def _cancel(user: User, call: Callable[[], Any], is_waiting: Callable[[], bool]) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(call())
        await wait_until_async(is_waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    user.do(lambda: user.wait(run()))


@pytest.mark.parametrize("kind", [AsyncpgUser, AsyncPsycopgUser], ids=lambda kind: kind.name)
def test_a_large_call_that_is_cancelled_leaves_nothing_behind(
    producer: Producer, dsn: str, db: psycopg.Connection, kind: type[User]
) -> None:
    with user_of(PsycopgUser, producer, dsn) as other, user_of(kind, producer, dsn) as user:
        user.enqueue(Task("b"))
        other.enqueue(Task("a", idempotency_token="t0700"))
        tasks = [Task("a", idempotency_token=f"t{n:04}") for n in range(1_300)]
        _cancel(
            user,
            lambda: producer.aenqueue_many_tx(user.target(), tasks),
            lambda: bool(value(db, f"SELECT cardinality(pg_blocking_pids({user.pid})) > 0")),
        )
        # The transaction goes on.
        user.enqueue(Task("b"))
        user.commit()
        assert [task.type for task in stored(db).values()] == ["b", "b"]
        assert value(db, "SELECT count(*) FROM token") == 0
        other.rollback()
        assert all(answer.is_new for answer in user.enqueue_many(tasks))
        user.commit()
        check_chunks(db)


def test_ids_that_were_taken_meanwhile_are_given_up(producer: Producer, dsn: str, db: psycopg.Connection) -> None:
    """As after a server that went back in time: the call fails, since the transaction is the user's; the next one has new ids."""
    with user_of(PsycopgUser, producer, dsn) as user:
        first = user.enqueue(Task("a"))
        user.commit()
        db.execute(
            "INSERT INTO task SELECT id, created_at, lane, leaf, max_attempts, format, payload FROM "
            "(SELECT * FROM task LIMIT 1) t, LATERAL (SELECT t.id + n AS id FROM generate_series(1, 5) n) i".replace(
                "SELECT id, created_at", "SELECT i.id, created_at"
            )
        )
        with pytest.raises(psycopg.errors.UniqueViolation) as caught:
            user.enqueue(Task("a"))
        assert "went back in time" in caught.value.__notes__[0]
        user.rollback()
        assert user.enqueue(Task("a")).id >= first.id + 1_000
        user.commit()
