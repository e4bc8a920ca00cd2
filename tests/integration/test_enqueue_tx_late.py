"""A transaction that was open for long: its tasks lie behind what everybody has claimed since, and are claimed all the same."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from fastq import Producer, Task, TaskInfo
from tests.support.consuming import new_consumer
from tests.support.producing import value
from tests.support.users import AsyncpgUser, PsycopgUser, User, user_of
from tests.support.waiting import wait_until

_POLL = 1.0
#: What a claim, and this machine, may take beyond the poll interval.
_SLACK = 2.0


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture(params=[PsycopgUser, AsyncpgUser], ids=lambda kind: kind.name)
def user(request: pytest.FixtureRequest, producer: Producer, dsn: str) -> Iterator[User]:
    with user_of(request.param, producer, dsn) as user:
        yield user


def _late_chunks(db: psycopg.Connection, ids: set[int]) -> list[int]:
    """The numbers of the late tasks' chunks that wait."""
    return [rid for (rid,) in db.execute("SELECT rid FROM ready WHERE hi = ANY (%s)", [sorted(ids)]).fetchall()]


def test_with_the_queue_idle(dsn: str, migrated: str, db: psycopg.Connection, producer: Producer, user: User) -> None:
    ran: dict[int, float] = {}
    consumer = new_consumer(dsn, migrated, poll_interval=_POLL)

    @consumer.handler("a")
    def handle(task: TaskInfo) -> None:
        ran[task.id] = time.monotonic()

    late = {answer.id for answer in (user.enqueue(Task("a")), *user.enqueue_many([Task("a"), Task("a", delay=0.05)]))}
    with consumer:
        for _ in range(30):
            others = {
                producer.enqueue(Task("a")).id,
                *(answer.id for answer in producer.enqueue_many([Task("a")] * 60)),
            }
            wait_until(lambda others=others: others <= ran.keys())  # type: ignore[misc]
        assert not late & ran.keys()
        numbers = value(db, "SELECT last_value FROM rid")
        user.commit()
        committed = time.monotonic()
        # Far behind what was claimed since.
        assert all(rid < numbers - 30 for rid in _late_chunks(db, late))
        wait_until(lambda: late <= ran.keys(), timeout=30)
    assert max(ran[id_] for id_ in late) - committed <= _POLL + _SLACK


def test_with_the_queue_saturated(
    dsn: str, migrated: str, db: psycopg.Connection, producer: Producer, user: User
) -> None:
    ran: dict[int, float] = {}
    consumer = new_consumer(dsn, migrated, poll_interval=_POLL, concurrency=8)

    @consumer.handler("a")
    async def handle(task: TaskInfo) -> None:
        ran[task.id] = time.monotonic()
        await asyncio.sleep(0.01)

    late = {answer.id for answer in (user.enqueue(Task("a")), *user.enqueue_many([Task("a")] * 2))}
    producer.enqueue_many(Task("a") for _ in range(20_000))
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.is_set():
            producer.enqueue(Task("a"))

    # Others commit all the while, one by one and in bulk.
    feeder = threading.Thread(target=go_on)
    feeder.start()
    try:
        with consumer:
            wait_until(lambda: len(ran) > 1_000)
            assert not late & ran.keys()
            numbers = value(db, "SELECT last_value FROM rid")
            user.commit()
            assert all(rid < numbers - 30 for rid in _late_chunks(db, late))
            # The next claim that is due after the poll interval. (A busy machine stretches both: a sweep keeps a distance of 20
            # times its own duration, and full prefetch is used up first.)
            wait_until(lambda: not _late_chunks(db, late), timeout=10 * _POLL, message="the late tasks are claimed")
            # There was enough to do without them.
            assert value(db, "SELECT sum(hi - lo + 1) FROM ready") > 5_000
            wait_until(lambda: late <= ran.keys(), timeout=30)
            consumer.stop(timeout=20)
    finally:
        is_over.set()
        feeder.join(30)
