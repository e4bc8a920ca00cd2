"""Handlers for all types that begin alike."""

from __future__ import annotations

import threading

import psycopg
import pytest

from fastq import App, Consumer, Producer, SettingsError, Task, TaskInfo
from tests.support.consuming import new_consumer, states, wait_for_states
from tests.support.waiting import wait_until


class Seen:
    """What ran, by which handler."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self.runs: list[tuple[str, str]] = []

    def add(self, type: str, *, is_async: bool = False) -> None:  # noqa: A002
        def note(task: TaskInfo) -> None:
            with self._lock:
                self.runs.append((type, task.type))

        async def note_async(task: TaskInfo) -> None:
            note(task)

        self._consumer.handler(type)(note_async if is_async else note)


@pytest.fixture
def consumer(dsn: str, migrated: str) -> Consumer:
    return new_consumer(dsn, migrated)


def enqueue(dsn: str, schema: str, *types: str) -> None:
    with Producer(dsn, schema=schema) as producer:
        producer.enqueue_many([Task(each) for each in types])


@pytest.mark.parametrize("is_async", [False, True])
def test_exact_goes_before_the_longest_prefix(
    consumer: Consumer, dsn: str, migrated: str, db: psycopg.Connection, *, is_async: bool
) -> None:
    seen = Seen(consumer)
    # In no order that helps.
    for each in ("report:*", "report:day:eu", "report:day:*", "mail", "rep%_*"):
        seen.add(each, is_async=is_async)
    wanted = [
        ("mail", "mail"),
        ("rep%_*", "rep%_x"),
        ("report:*", "report:"),
        ("report:*", "report:day"),
        ("report:*", "report:Äx"),
        ("report:day:*", "report:day:eu2"),
        ("report:day:*", "report:day:us"),
        ("report:day:eu", "report:day:eu"),
    ]
    nobodys = ["mail2", "report", "Report:x", "repxxx"]
    enqueue(dsn, migrated, *(each for _, each in wanted), *nobodys)
    with consumer:
        wait_for_states(db, {"completed": len(wanted), "pending": len(nobodys)})
    assert sorted(seen.runs) == wanted


def test_types_that_come_later_are_served(consumer: Consumer, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    seen = Seen(consumer)
    seen.add("report:*")
    with consumer:
        for count, each in enumerate(("report:a", "report:b", "report:c"), 1):
            enqueue(dsn, migrated, each)
            wait_for_states(db, {"completed": count})
    assert [each for _, each in seen.runs] == ["report:a", "report:b", "report:c"]


def test_types_that_come_later_are_served_without_a_notification(
    dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    consumer = new_consumer(dsn, migrated, listen=False)
    Seen(consumer).add("*")
    with consumer:
        for count, each in enumerate(("a", "b"), 1):
            enqueue(dsn, migrated, each)
            wait_for_states(db, {"completed": count})


def test_a_prefix_has_one_cap_one_policy_and_its_queues(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    consumer = new_consumer(dsn, migrated, queues=["mine"])
    gate = threading.Event()
    running: list[str] = []

    @consumer.handler("t:*", workers=2, retry_policy=lambda _task, _error: 3600)
    def handle(task: TaskInfo) -> None:
        running.append(task.type)
        assert gate.wait(30)
        if task.type == "t:5":
            raise ValueError("no")

    with Producer(dsn, schema=migrated) as producer:
        producer.enqueue_many([Task(f"t:{n}", queue="mine") for n in range(6)])
        producer.enqueue(Task("t:0"))
    with consumer:
        wait_until(lambda: len(running) == 2)
        wait_until(lambda: consumer.stats()["claimed"] >= 2)
        assert len(running) == 2
        gate.set()
        wait_until(lambda: states(db) == {"completed": 5, "pending": 2})
    assert db.execute("SELECT kind FROM tasks WHERE type = 't:5'").fetchall() == [("retrying",)]


def test_a_prefix_is_registered_once(consumer: Consumer) -> None:
    consumer.handler("a:*")(lambda _task: None)
    with pytest.raises(SettingsError, match=r"type 'a:\*' has a handler"):
        consumer.handler("a:*")(lambda _task: None)
    with pytest.raises(SettingsError, match=r"can't end in \*"):
        App("host=nowhere").task("a:*")(lambda: None)
