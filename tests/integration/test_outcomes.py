"""What a handler says of its task by what it raises, and what then stands in the tables."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import ConstantBackoff, Consumer, SkipRetry, Snooze, SnoozeWithError, Task, TaskInfo
from tests.support.consuming import errors, new_consumer, states
from tests.support.lab import QUICK, Lab
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.fixture
def make(lab: Lab) -> Iterator[Callable[..., Consumer]]:
    """Makes consumers to register handlers with; those that were started are stopped at the end."""
    made: list[Consumer] = []

    def new(**settings: Any) -> Consumer:
        made.append(new_consumer(lab.dsn, lab.schema, **(QUICK | settings)))
        return made[-1]

    yield new
    for consumer in made:
        consumer.stop(5)


def _handler(act: Callable[[TaskInfo], None], *, is_async: bool) -> Callable[[TaskInfo], Any]:
    async def handler(task: TaskInfo) -> None:
        await asyncio.sleep(0)
        act(task)

    return handler if is_async else act


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@both
def test_skip_retry_fails_at_once_and_keeps_the_error(lab: Lab, is_async: bool) -> None:
    def act(task: TaskInfo) -> None:
        raise SkipRetry("no such customer") from KeyError(task.payload)

    consumer = lab.consumer(_handler(act, is_async=is_async))
    lab.enqueue("c1", max_attempts=5)
    lab.wait_for(failed=1)
    [(attempt, error, traceback)] = errors(lab.db)
    assert (attempt, error) == (1, "SkipRetry: no such customer")
    assert "KeyError: 'c1'" in traceback
    assert lab.db.execute("SELECT attempts, max_attempts FROM tasks").fetchall() == [(1, 5)]
    wait_until(lambda: consumer.stats()["failed"] == 1)


@both
def test_a_snooze_is_no_attempt_however_often_it_comes(lab: Lab, is_async: bool) -> None:
    attempts: list[int] = []

    def act(task: TaskInfo) -> None:
        attempts.append(task.attempt)
        if len(attempts) < 6:
            raise Snooze(0)

    consumer = lab.consumer(_handler(act, is_async=is_async))
    lab.enqueue(None, max_attempts=1)
    lab.wait_for(completed=1)
    assert attempts == [1] * 6
    assert errors(lab.db) == []
    assert lab.value("SELECT attempts FROM tasks") == 1
    wait_until(lambda: consumer.stats()["completed"] == 1)
    assert [consumer.stats()[name] for name in ("snoozed", "retried", "failed", "refused")] == [5, 0, 0, 0]


def test_a_snoozed_task_waits_for_its_time_as_a_scheduled_one(lab: Lab) -> None:
    def act(task: TaskInfo) -> None:
        raise ValueError from Snooze(3600)

    consumer = lab.consumer(act)
    lab.enqueue("x", max_attempts=1)
    wait_until(lambda: consumer.stats()["snoozed"] == 1)
    [row] = lab.db.execute(
        "SELECT state, kind, attempts, payload, extract(epoch FROM run_at - clock_timestamp()) BETWEEN 3500 AND 3600 FROM tasks"
    ).fetchall()
    assert row == ("pending", "scheduled", 0, '"x"', True)


@both
def test_a_snooze_with_an_error_is_an_attempt_at_a_time_of_its_own(lab: Lab, is_async: bool) -> None:
    attempts: list[int] = []

    def act(task: TaskInfo) -> None:
        attempts.append(task.attempt)
        raise SnoozeWithError(0, "not yet")

    lab.consumer(_handler(act, is_async=is_async), retry_policy=ConstantBackoff(3600))
    lab.enqueue(None, max_attempts=3)
    lab.wait_for(failed=1)
    assert attempts == [1, 2, 3]
    assert [(attempt, error) for attempt, error, _ in errors(lab.db)] == [
        (number, "SnoozeWithError: not yet") for number in (1, 2, 3)
    ]


def test_of_a_group_the_gravest_member_decides(lab: Lab) -> None:
    async def act(task: TaskInfo) -> None:
        async def part(error: Exception) -> None:
            raise error

        async with asyncio.TaskGroup() as group:
            group.create_task(part(Snooze(0)))
            group.create_task(part(SkipRetry("one of them")))

    lab.consumer(act)
    lab.enqueue(None)
    lab.wait_for(failed=1)
    [(_, _, traceback)] = errors(lab.db)
    assert "SkipRetry: one of them" in traceback


@both
def test_the_hook_is_told_of_failed_attempts_and_of_those_out_of_time(
    lab: Lab, make: Callable[..., Consumer], is_async: bool
) -> None:
    heard: list[tuple[str, int, bool]] = []
    release = threading.Event()

    def hook(task: TaskInfo, error: BaseException, /, *, is_final: bool) -> None:
        heard.append((type(error).__name__, task.attempt, is_final))
        raise RuntimeError("the hook's own trouble")

    def act(task: TaskInfo) -> None:
        if task.payload == "slow":
            release.wait(30)
        raise ValueError("no")

    async def act_async(task: TaskInfo) -> None:
        if task.payload == "slow":
            await asyncio.Event().wait()
        raise ValueError("no")

    consumer = make(error_hook=hook)
    consumer.handler("t", timeout=0.3)(act_async if is_async else act)
    consumer.start()
    lab.enqueue("fast", max_attempts=2)
    lab.wait_for(failed=1)
    assert heard == [("ValueError", 1, False), ("ValueError", 2, True)]
    heard.clear()
    lab.enqueue("slow", max_attempts=1)
    lab.wait_for(failed=2)
    release.set()
    assert heard == [("TimeoutError", 1, True)]


def test_each_type_may_have_a_policy_of_its_own(lab: Lab, make: Callable[..., Consumer]) -> None:
    def act(task: TaskInfo) -> None:
        raise ValueError(task.type)

    consumer = make(retry_policy=lambda task, error: 1000)
    consumer.handler("t")(act)
    consumer.handler("u", retry_policy=lambda task, error: 2000 if str(error) == "u" else 0)(act)
    consumer.start()
    lab.producer.enqueue_many([Task("t"), Task("u")])
    wait_until(lambda: consumer.stats()["retried"] == 2)
    rows = lab.db.execute(
        "SELECT type, round(extract(epoch FROM run_at - clock_timestamp()) / 1000) FROM tasks ORDER BY 1"
    ).fetchall()
    assert rows == [("t", 1), ("u", 2)]
    assert states(lab.db) == {"pending": 2}
