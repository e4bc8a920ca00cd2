"""Who wakes the consumers after the user's commit: a hook where the driver has one, NOTIFY in the transaction only where it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Any

import psycopg
import pytest

from fastq import Producer, Task, TaskInfo
from tests.support.consuming import new_consumer
from tests.support.users import (
    AsyncpgUser,
    AsyncSqlAlchemySessionUser,
    AsyncSqlAlchemyUser,
    DjangoUser,
    PsycopgUser,
    SqlAlchemySessionUser,
    SqlAlchemyUser,
    User,
    user_of,
)
from tests.support.waiting import wait_until

_HOOKED = [SqlAlchemyUser, SqlAlchemySessionUser, AsyncSqlAlchemyUser, AsyncSqlAlchemySessionUser, DjangoUser]
_UNHOOKED = [PsycopgUser, AsyncpgUser]


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def user(request: pytest.FixtureRequest, producer: Producer, dsn: str) -> Iterator[User]:
    with user_of(request.param, producer, dsn) as user:
        yield user


@pytest.fixture
def listener(dsn: str, migrated: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f'LISTEN "fastq:{migrated}"'.encode())
        yield connection


def _hears(listener: psycopg.Connection, seconds: float) -> bool:
    return bool(list(listener.notifies(timeout=seconds, stop_after=1)))


def _kinds(users: list[type[User]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("user", users, indirect=True, ids=lambda kind: kind.name)


@_kinds(_HOOKED)
@pytest.mark.parametrize("has_savepoint", [False, True])
def test_a_hook_tells_after_the_commit_alone(
    user: User, producer: Producer, listener: psycopg.Connection, has_savepoint: bool
) -> None:
    if has_savepoint:
        user.execute("SAVEPOINT mine")
    user.enqueue_many([Task("a"), Task("b")])
    if has_savepoint:
        user.execute("RELEASE SAVEPOINT mine")
    assert not _hears(listener, 0.2)
    user.commit()
    assert _hears(listener, 10)
    # Once for the transaction, not again with the next.
    user.execute("SELECT 1")
    user.commit()
    assert not _hears(listener, 0.3)
    assert producer.stats()["notifies"] == 1


@_kinds(_HOOKED)
def test_what_is_rolled_back_tells_nobody(user: User, listener: psycopg.Connection) -> None:
    user.enqueue(Task("a"))
    user.rollback()
    user.execute("SELECT 1")
    user.commit()
    assert not _hears(listener, 0.3)


@_kinds([SqlAlchemySessionUser, AsyncSqlAlchemySessionUser])
def test_a_sessions_savepoint_is_no_commit(user: User, listener: psycopg.Connection) -> None:
    connection = user.connection  # type: ignore[attr-defined]
    if user.is_async:
        nested = user.do(lambda: user.wait(_begin_nested(connection)))
        user.enqueue(Task("a"))
        user.do(lambda: user.wait(nested.commit()))
    else:
        nested = user.do(connection.begin_nested)
        user.enqueue(Task("a"))
        user.do(nested.commit)
    assert not _hears(listener, 0.3)
    user.commit()
    assert _hears(listener, 10)


async def _begin_nested(session: Any) -> Any:
    return await session.begin_nested()


@_kinds([SqlAlchemySessionUser])
def test_a_sessions_savepoint_that_is_rolled_back_takes_no_wake_up_with_it(
    user: User, listener: psycopg.Connection
) -> None:
    user.enqueue(Task("a"))
    nested = user.do(user.connection.begin_nested)  # type: ignore[attr-defined]
    user.enqueue(Task("b"))
    user.do(nested.rollback)
    assert not _hears(listener, 0.2)
    user.commit()
    assert _hears(listener, 10)


@_kinds(_UNHOOKED)
def test_without_a_hook_nobody_is_told_unless_it_is_asked_for(user: User, listener: psycopg.Connection) -> None:
    user.enqueue(Task("a"))
    user.enqueue_many([Task("a")] * 100)
    user.commit()
    assert not _hears(listener, 0.3)
    user.enqueue(Task("a"), notify=True)
    assert not _hears(listener, 0.2)
    user.commit()
    assert _hears(listener, 10)
    user.enqueue_many([Task("a")] * 100, notify=True)
    assert user.value("SHOW synchronous_commit") == "on"
    user.commit()
    assert _hears(listener, 10)


@_kinds([DjangoUser])
def test_a_hook_and_notify_tell_once(user: User, producer: Producer, listener: psycopg.Connection) -> None:
    user.enqueue(Task("a"), notify=True)
    user.commit()
    assert _hears(listener, 10)
    assert not _hears(listener, 0.3)


@_kinds([SqlAlchemyUser])
def test_a_producer_that_never_notifies_does_not(
    user: User, dsn: str, migrated: str, listener: psycopg.Connection
) -> None:
    with Producer(dsn, schema=migrated, notify=False) as quiet:
        user.producer = quiet
        user.enqueue(Task("a"))
        user.commit()
        assert not _hears(listener, 0.3)


@_kinds([SqlAlchemyUser, PsycopgUser])
def test_a_woken_consumer_does_not_wait_for_its_poll(
    user: User, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    ran = Event()
    consumer = new_consumer(dsn, migrated, poll_interval=60)

    @consumer.handler("a")
    def handle(task: TaskInfo) -> None:
        ran.set()

    with consumer:
        wait_until(lambda: db.execute("SELECT FROM consumer").fetchone() is not None)
        user.enqueue(Task("a"), notify=isinstance(user, PsycopgUser))
        user.commit()
        wait_until(ran.is_set)
