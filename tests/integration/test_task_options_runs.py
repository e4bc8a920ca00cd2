"""A task's own timeout and retry policy at work, before those of its type and its consumer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import App, Client, ConstantBackoff, Consumer, ExponentialBackoff, Snooze, SnoozeWithError, Task, TaskInfo
from fastq._backoff import Backoff
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until

Handler = Callable[[TaskInfo], Any]

both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as made:
        yield made


class Sleeper:
    """Handlers that take as many seconds as their payload says, or until the test ends; and what they saw."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, float | None, Backoff | None, object]]] = {}
        self._end = threading.Event()

    def _note(self, task: TaskInfo) -> None:
        self.seen.setdefault(task.id, []).append((task.attempt, task.timeout, task.retry, task.payload))

    def sync(self, task: TaskInfo) -> None:
        self._note(task)
        self._end.wait(task.payload)

    async def coroutine(self, task: TaskInfo) -> None:
        self._note(task)
        await asyncio.sleep(task.payload)

    def release(self) -> None:
        self._end.set()


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    made = Sleeper()
    yield made
    made.release()


def start(lab: Lab, sleeper: Sleeper, *, is_async: bool, **settings: Any) -> Consumer:
    return lab.consumer(sleeper.coroutine if is_async else sleeper.sync, stop_timeout=1, **settings)


@both
def test_a_timeout_of_its_own_where_its_type_has_none(lab: Lab, sleeper: Sleeper, *, is_async: bool) -> None:
    """Its neighbours, claimed with it, take the time that they take."""
    start(lab, sleeper, is_async=is_async)
    tasks = [Task("t", 20, timeout=0.3, max_attempts=1) if n % 5 == 2 else Task("t", 1.0) for n in range(10)]
    ids = [answer.id for answer in lab.producer.enqueue_many(tasks)]
    wait_for_states(lab.db, {"completed": 8, "failed": 2})
    sleeper.release()
    rows = lab.all("SELECT id, error FROM attempt_error ORDER BY id")
    assert [id_ for id_, _ in rows] == [ids[2], ids[7]]
    assert all("longer than its timeout of 0.3 s" in error for _, error in rows)
    assert sleeper.seen[ids[2]] == [(1, 0.3, None, 20)]
    assert sleeper.seen[ids[3]] == [(1, None, None, 1.0)]


@both
def test_a_longer_one_than_its_type_has(lab: Lab, sleeper: Sleeper, *, is_async: bool) -> None:
    start(lab, sleeper, is_async=is_async, timeout=0.3)
    [short, long] = lab.producer.enqueue_many(
        [Task("t", 20, max_attempts=1), Task("t", 1.2, timeout=30, max_attempts=1)]
    )
    wait_for_states(lab.db, {"completed": 1, "failed": 1})
    assert set(lab.completions()) == {long.id}
    assert lab.all("SELECT id FROM attempt_error") == [(short.id,)]


@both
def test_each_attempt_has_it(lab: Lab, sleeper: Sleeper, *, is_async: bool) -> None:
    """And its policy, which is asked after a time that is up, too."""
    start(lab, sleeper, is_async=is_async, retry_policy=ConstantBackoff(3600))
    policy = ExponentialBackoff(exponent=0, jitter=0, maximum=0.01)
    id_ = lab.producer.enqueue(Task("t", 20, timeout=0.2, retry=policy, max_attempts=3)).id
    wait_for_states(lab.db, {"failed": 1})
    assert lab.value("SELECT count(*) FROM attempt_error") == 3
    assert sleeper.seen[id_] == [(attempt, 0.2, policy, 20) for attempt in (1, 2, 3)]


@both
def test_its_policy_goes_before_its_types_and_its_consumers(lab: Lab, *, is_async: bool) -> None:
    def handle(task: TaskInfo) -> None:
        if task.attempt == 1:
            raise ValueError

    async def ahandle(task: TaskInfo) -> None:
        handle(task)

    consumer = new_consumer(lab.dsn, lab.schema, retry_policy=lambda task, error: 5_000)
    consumer.handler("plain")(ahandle if is_async else handle)
    consumer.handler("own", retry_policy=ConstantBackoff(7_000))(ahandle if is_async else handle)
    now, later = ConstantBackoff(0), ExponentialBackoff(exponent=0, jitter=0, maximum=3_000)
    tasks = [Task(type_, retry=retry) for type_ in ("plain", "own") for retry in (None, now, later)]
    ids = [answer.id for answer in lab.producer.enqueue_many(tasks)]
    with consumer, Client(lab.dsn, schema=lab.schema) as client:
        wait_for_states(lab.db, {"completed": 2, "pending": 4})
        wait_until(lambda: len(lab.all("SELECT FROM delayed WHERE kind = 'retrying'")) == 4)
        waits = []
        for task, id_ in zip(tasks, ids, strict=True):
            record = client.get_task(id_)
            assert record.retry == task.retry
            [failed] = record.errors or ()
            left = record.run_at and (record.run_at - failed.failed_at).total_seconds()
            waits.append(left and round(left))
    assert waits == [5_000, None, 1, 7_000, None, 1]


def test_what_a_handler_says_of_a_failure_goes_first(lab: Lab) -> None:
    def handle(task: TaskInfo) -> None:
        if task.attempt == 1:
            raise SnoozeWithError(3_000) if task.payload else ValueError

    lab.consumer(handle)
    [said, left] = lab.producer.enqueue_many(
        [Task("t", 1, retry=ConstantBackoff(0)), Task("t", 0, retry=ConstantBackoff(0))]
    )
    wait_for_states(lab.db, {"completed": 1, "pending": 1})
    assert set(lab.completions()) == {left.id}
    assert lab.value("SELECT run_at > clock_timestamp() + interval '2900 s' FROM delayed WHERE id = %s", said.id)


def test_a_snoozed_task_keeps_them(lab: Lab) -> None:
    seen: list[tuple[float | None, Backoff | None, object, bytes]] = []

    def handle(task: TaskInfo) -> None:
        seen.append((task.timeout, task.retry, task.payload, task.raw_payload))
        if len(seen) < 3:
            raise Snooze(0)

    lab.consumer(handle)
    lab.producer.enqueue(Task("t", b"\nraw", timeout=60, retry=ConstantBackoff(1)))
    wait_for_states(lab.db, {"completed": 1})
    assert seen == [(60, ConstantBackoff(1), b"\nraw", b"\nraw")] * 3


def test_a_task_of_a_killed_worker_keeps_them(lab: Lab) -> None:
    worker, gate = lab.worker(), lab.gate()
    [id_] = lab.enqueue(gate.orders, timeout=600, retry=ConstantBackoff(1))
    wait_until(lambda: lab.journal.started() == [id_])
    lab.wait_for_beat(lab.consumer_id(pid=worker.pid), running=[id_])
    worker.kill()
    runs: list[tuple[int, float | None, Backoff | None]] = []
    lab.consumer(lambda task: runs.append((task.attempt, task.timeout, task.retry)))
    lab.wait_for(completed=1)
    assert runs == [(2, 600, ConstantBackoff(1))]


def test_a_damaged_line_fails_its_task_alone(lab: Lab) -> None:
    """At once, with the reason: nobody knows how it was to be run. What was claimed with it runs."""
    options: dict[str, Any] = {"timeout": 60, "retry": ConstantBackoff(0)}
    tasks = [Task("t", n, max_attempts=5, **(options if n % 2 else {})) for n in range(20)]
    ids = [answer.id for answer in lab.producer.enqueue_many(tasks)]
    damaged = dict(
        zip(ids[1:20:4], (b"", b'{"timeout":60}', b'{"timeout":-1}\n1', b'{"color":1}\n2', b"\xff\n3"), strict=True)
    )
    for id_, payload in damaged.items():
        lab.db.execute("UPDATE task SET payload = %s WHERE id = %s", (payload, id_))
    runs = Runs()
    consumer = lab.consumer(runs)
    lab.wait_for(completed=15, failed=5)
    assert sorted(runs.ids) == sorted(set(ids) - set(damaged))
    rows = lab.all("SELECT id, attempt, error FROM attempt_error ORDER BY id")
    assert [(id_, attempt) for id_, attempt, _ in rows] == [(id_, 1) for id_ in damaged]
    reasons = ["its line has no end"] * 2 + ["timeout is -1, but must be", "color is not known to this version", ""]
    for (_, _, error), reason in zip(rows, reasons, strict=True):
        assert f"the task's own timeout and retry can't be read: {reason}" in error
    # And again: it is claimed as any other, and the whole claim may be of such.
    with Client(lab.dsn, schema=lab.schema) as client:
        assert client.retry_tasks(ids=list(damaged)) == 5
        wait_until(lambda: lab.value("SELECT count(*) FROM attempt_error") == 10)
        lab.wait_for(completed=15, failed=5)
    assert consumer.stats()["refused"] == 0
    lab.enqueue(1)
    lab.wait_for(completed=16, failed=5)


def test_the_archive_has_the_payload_alone(lab: Lab) -> None:
    def handle(task: TaskInfo) -> None:
        if task.payload == "fail":
            raise ValueError

    lab.consumer(handle, completed_retention=0.5, failed_retention=0.5, archive=True)
    options: dict[str, Any] = {"timeout": 60, "retry": ConstantBackoff(0), "max_attempts": 1}
    payloads: list[object] = ["fail", {"n": 1}, b"\nraw"]
    tasks = [Task("t", payload, **words) for payload in payloads for words in ({}, options)]
    lab.producer.enqueue_many(tasks)
    wait_until(lambda: lab.value("SELECT count(*) FROM archive") == 6, timeout=30)
    rows = lab.all("SELECT format::text, payload FROM archive")
    assert sorted(rows) == [row for row in [("b", b"\nraw"), ("j", b'"fail"'), ("j", b'{"n":1}')] for _ in range(2)]


def test_of_an_apps_function(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    app = App(dsn, schema=migrated)
    begun: list[int] = []

    @app.task("t", timeout=60, retry_policy=ConstantBackoff(3600), max_attempts=2)
    async def f(seconds: float) -> None:
        begun.append(1)
        await asyncio.sleep(seconds)

    with app.consumer(poll_interval=0.2):
        f.with_options(timeout=0.2, retry=ConstantBackoff(0)).enqueue(20)
        f.enqueue(0)
        wait_for_states(db, {"completed": 1, "failed": 1})
    assert len(begun) == 3
    app.producer.close()
