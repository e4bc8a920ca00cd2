"""Sync handlers that go on although their time is up: how many there may be, and how a consumer with too many ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest

from fastq import Consumer, ConsumerError, Producer, Task, TaskInfo
from tests.support.consuming import new_consumer, states, wait_for_states
from tests.support.waiting import wait_until


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets the stuck ones go; at the latest when the test ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def consumer(dsn: str, migrated: str, release: threading.Event) -> Consumer:
    """It bears one stuck handler."""
    consumer = new_consumer(dsn, migrated, stuck_limit=1)
    consumer.handler("stuck", timeout=0.1)(lambda _: release.wait(60))
    consumer.handler("free")(lambda _: None)
    return consumer


def test_up_to_the_limit_others_take_their_places(
    consumer: Consumer, producer: Producer, release: threading.Event, db: psycopg.Connection
) -> None:
    producer.enqueue(Task("stuck", max_attempts=1))
    with consumer:
        wait_until(lambda: consumer.stats()["stuck"] == 1)
        wait_for_states(db, {"failed": 1})
        producer.enqueue_many(Task("free") for _ in range(100))
        wait_for_states(db, {"failed": 1, "completed": 100})
        assert consumer.stats()["stuck"] == 1
        release.set()
        wait_until(lambda: consumer.stats()["stuck"] == 0)


def test_one_more_and_it_ends_in_order(
    consumer: Consumer, producer: Producer, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    may_end = threading.Event()
    is_slow = threading.Event()

    @consumer.handler("slow")
    def slow(_: TaskInfo) -> None:
        is_slow.set()
        assert may_end.wait(60)

    producer.enqueue(Task("slow"))
    consumer.start()
    wait_until(is_slow.is_set)
    producer.enqueue_many(Task("stuck", max_attempts=1) for _ in range(2))
    wait_until(lambda: "2 sync handlers go on although their time is up (stuck_limit is 1)" in caplog.text)
    # It claims no more, and waits for those that may still end.
    late = producer.enqueue(Task("free"))
    wait_until(
        lambda: states(db) == {"running": 1, "failed": 2, "pending": 1}, message=f"all but task {late.id} to be settled"
    )
    may_end.set()
    wait_for_states(db, {"completed": 1, "failed": 2, "pending": 1})
    wait_until(lambda: db.execute("SELECT count(*) FROM consumer").fetchone() == (0,), message="it to sign off")
    with pytest.raises(ConsumerError, match="ended by itself: 2 sync handlers go on"):
        consumer.stop(5)


def test_what_does_not_end_in_time_is_left_to_others(
    dsn: str, migrated: str, producer: Producer, release: threading.Event, db: psycopg.Connection
) -> None:
    consumer = new_consumer(dsn, migrated, stuck_limit=1, stop_timeout=0.5)
    consumer.handler("stuck", timeout=0.1)(lambda _: release.wait(60))
    consumer.handler("slow")(lambda _: release.wait(60))
    producer.enqueue(Task("slow"))
    producer.enqueue_many(Task("stuck", max_attempts=1) for _ in range(2))
    with pytest.raises(ConsumerError, match="stuck_limit is 1"):
        consumer.run()
    assert states(db) == {"failed": 2, "running": 1}
