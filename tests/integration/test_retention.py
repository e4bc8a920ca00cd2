"""Retention on whole engines: each outcome and each queue for its own time, and consumers that leave it to others."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import Client, Consumer, Retention, SettingsError, Task, TaskInfo
from tests.support.consuming import states
from tests.support.lab import Lab
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


def test_a_queue_that_keeps_nothing_is_cleared_beside_one_that_does(lab: Lab) -> None:
    lab.consumer(lambda _: None, queue_retention={"cache": Retention(completed=0)})
    kept = lab.enqueue(count=700)
    for _ in range(3):
        lab.producer.enqueue_many(Task("t", queue="cache") for _ in range(700))
        wait_until(lambda: lab.value("SELECT count(*) FROM task") == 700)
    assert states(lab.db) == {"completed": 700}
    assert sorted(id_ for (id_,) in lab.all("SELECT id FROM task")) == kept


def test_what_ends_late_goes_too(lab: Lab) -> None:
    """Behind the place up to which the leader has looked before."""
    release: list[int] = []

    def handle(task: TaskInfo) -> None:
        if task.payload == "late":
            wait_until(lambda: release, timeout=30)

    lab.consumer(handle, queue_retention={"cache": Retention(completed=timedelta(0))}, prefetch=1)
    lab.producer.enqueue(Task("t", "late", queue="cache"))
    wait_until(lambda: lab.value("SELECT count(*) FROM claim") == 1)
    for _ in range(2):
        lab.producer.enqueue_many(Task("t", "soon", queue="cache") for _ in range(20))
        wait_until(lambda: lab.value("SELECT count(*) FROM task") == 1)
    release.append(1)
    lab.producer.enqueue_many(Task("t", "soon", queue="cache") for _ in range(20))
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0)


def test_cancelled_tasks_have_a_time_of_their_own(lab: Lab) -> None:
    def handle(task: TaskInfo) -> None:
        raise ValueError

    failed = lab.enqueue(count=3, max_attempts=1)
    lab.consumer(handle, cancelled_retention=0.1)
    lab.wait_for(failed=3)
    lab.db.execute("UPDATE dead SET state = 'cancelled' WHERE id = %s", [failed[0]])
    wait_until(lambda: lab.value("SELECT count(*) FROM dead") == 2)
    assert states(lab.db) == {"failed": 2}


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "expired"])
@pytest.mark.parametrize("by_queue", [False, True])
def test_each_outcome_can_be_deleted_at_once(lab: Lab, outcome: str, by_queue: bool) -> None:
    """For all queues, or for one; the other outcomes stay, and so does what waits."""

    def handle(task: TaskInfo) -> None:
        if task.payload == "fail":
            raise ValueError

    settings: dict[str, Any] = (
        {"queue_retention": {"cache": Retention(**dict[str, Any]({outcome: 0}))}}
        if by_queue
        else {f"{outcome}_retention": 0}
    )
    queues = ("cache", "default")
    for queue in queues:
        lab.enqueue("fine", queue=queue)
        lab.enqueue("fail", queue=queue, max_attempts=1)
        lab.enqueue_type("other", "waits", queue=queue)
        lab.enqueue_type("other", "over", queue=queue, expires_at=datetime.now(UTC) + timedelta(seconds=0.1))
        [cancelled] = lab.enqueue_type("other", "cancelled", queue=queue)
        with Client(lab.dsn, schema=lab.schema) as client:
            client.cancel_task(cancelled)
    lab.consumer(handle, **settings)
    expected = {
        (queue, state)
        for queue in queues
        for state in ("pending", "completed", "failed", "cancelled", "expired")
        if state != outcome or (by_queue and queue == "default")
    }
    wait_until(
        lambda: (
            set(lab.all("SELECT queue, state FROM tasks")) == expected and lab.value("SELECT count(*) FROM ready") == 2
        ),
        timeout=20,
    )
    # Contents, too: one of each waiting or completed task, and the copies of those that ended otherwise, which their leaf keeps.
    gone = 0 if outcome != "completed" else 1 if by_queue else 2
    assert lab.value("SELECT count(*) FROM task") == 10 - gone


def test_what_is_deleted_at_once_turns_no_leaves(lab: Lab) -> None:
    """A leaf that closed with each round would have all that waits copied each time."""
    lab.consumer(lambda _: None, completed_retention=0)
    waiting = lab.enqueue_others(*range(100))
    for _ in range(3):
        lab.enqueue(count=200)
        wait_until(lambda: lab.value("SELECT count(*) FROM task") == 100)
    assert lab.all("SELECT no, state FROM leaf WHERE state <> 'empty'") == [(0, "open")]
    assert [id_ for (id_,) in lab.all("SELECT id FROM task ORDER BY id")] == waiting


def test_a_consumer_without_upkeep_never_leads(lab: Lab) -> None:
    silent = lab.consumer(lambda _: None, upkeep=False)
    lab.enqueue(count=10)
    lab.producer.enqueue(Task("t", delay=0.05))
    lab.wait_for(completed=10, pending=1)
    # Some ticks of it: each would have taken the lease.
    before = silent.stats()["statements"]
    wait_until(lambda: silent.stats()["statements"] > before + 10)
    assert lab.value("SELECT count(*) FROM leader WHERE expires_at > clock_timestamp()") == 0
    assert states(lab.db) == {"completed": 10, "pending": 1}
    lab.consumer()
    lab.wait_for(completed=11)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mail": 5}, r"queue_retention\['mail'\] is 5, but must be a Retention"),
        ([("mail", Retention())], "must be a mapping of queues to Retention"),
        ({"": Retention()}, "a queue in queue_retention has 0 characters"),
        ({7: Retention()}, "a queue in queue_retention is 7, but must be a str"),
    ],
)
def test_a_wrong_queue_retention_is_refused(setting: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Consumer("postgresql://nowhere", queue_retention=setting)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "5", timedelta(days=-1), True])
def test_a_wrong_time_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="completed"):
        Retention(completed=value)
