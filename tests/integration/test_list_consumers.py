"""Who works, and what each runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

import fastq
from fastq import Client, Producer, Task
from tests.support import clients
from tests.support.consuming import new_consumer
from tests.support.waiting import wait_until


@pytest.fixture(params=clients.KINDS)
def client(request: pytest.FixtureRequest, dsn: str, migrated: str) -> Iterator[Client]:
    with clients.open_client(request.param, dsn, schema=migrated) as found:
        yield found


def test_nobody(client: Client) -> None:
    assert client.list_consumers() == ()


def test_what_each_runs(client: Client, dsn: str, migrated: str) -> None:
    may_end = threading.Event()
    busy = new_consumer(
        dsn, migrated, concurrency=2, queues=["a", "b"], heartbeat_interval=0.1, dead_after=5, upkeep=False
    )
    busy.handler("slow")(lambda _: may_end.wait(60))
    idle = new_consumer(dsn, migrated, heartbeat_interval=0.1, dead_after=5)
    idle.handler("report:*")(lambda _: None)
    with Producer(dsn, schema=migrated) as producer:
        ids = [one.id for one in producer.enqueue_many(Task("slow", queue="a") for _ in range(5))]
    try:
        with busy:
            wait_until(lambda: [len(one.running) for one in client.list_consumers()] == [2])
            with idle:
                wait_until(lambda: [one.is_leader for one in client.list_consumers()] == [False, True])
                first, second = client.list_consumers()
                assert (first.types, first.queues, second.types, second.queues) == (
                    ("slow",),
                    ("a", "b"),
                    ("report:*",),
                    None,
                )
                assert (second.running, second.claimed) == ((), 0)
            assert set(first.running) < set(ids)
            assert first.claimed >= 2
            assert (first.refused, first.dead_at, first.is_stopping) == (0, None, False)
            assert first.version == fastq.__version__
            assert first.pid > 0
            assert first.host
            assert timedelta(0) <= first.beat_at - first.started_at < timedelta(minutes=1)
            assert abs(datetime.now(UTC) - first.started_at) < timedelta(hours=1)
            assert first.started_at.utcoffset() == timedelta(0)
            may_end.set()
    finally:
        may_end.set()
    assert client.list_consumers() == ()


def test_one_that_died_while_it_was_stopping(client: Client, db: psycopg.Connection) -> None:
    db.execute(
        "INSERT INTO consumer (id, pid, host, version, types, stopping, dead_at, running) "
        "VALUES (7, 8, 'h', '0.1.0', '{t}', true, clock_timestamp(), '{[1,3)}')"
    )
    db.execute(
        "INSERT INTO claim (consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, ids) "
        "VALUES (7, 1, 1, 0, 0, 0, 3, 10, '{[1,3),[5,6)}')"
    )
    [dead] = client.list_consumers()
    assert (dead.id, dead.pid, dead.host, dead.is_stopping, dead.is_leader) == (7, 8, "h", True, False)
    assert dead.dead_at is not None
    assert (dead.running, dead.claimed) == ((1, 2), 3)
