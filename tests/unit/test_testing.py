"""`fastq.testing`: a task for unit tests of handlers, with no database."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import fastq
from fastq.testing import cancel, task_context


@dataclass
class Order:
    """A payload."""

    id: int
    lines: tuple[str, ...]


def test_it_is_the_current_task_within_the_block() -> None:
    with task_context("email:send", {"to": "a"}, id=7, queue="mail", attempt=2, max_attempts=5) as task:
        assert isinstance(task, fastq.TaskInfo)
        assert fastq.current_task() is task
        assert (task.id, task.type, task.queue, task.payload) == (7, "email:send", "mail", {"to": "a"})
        assert (task.attempt, task.max_attempts, task.is_cancelled()) == (2, 5, False)
        assert task.raw_payload == b'{"to":"a"}'
        assert repr(task) == '<TaskInfo 7 "email:send" attempt 2 of 5>'
    with pytest.raises(fastq.TaskError, match="no task is running"):
        fastq.current_task()


def test_defaults() -> None:
    before = datetime.now(UTC)
    with task_context() as task:
        assert (task.id, task.type, task.queue, task.payload) == (1, "test", "default", None)
        assert (task.attempt, task.max_attempts) == (1, fastq.Task("t").max_attempts)
        assert before <= task.created_at <= datetime.now(UTC)


def test_it_can_be_nested_and_ends_when_the_block_raises() -> None:
    with task_context(id=1) as outer:
        with contextlib.suppress(ValueError), task_context(id=2) as inner:
            assert fastq.current_task() is inner
            raise ValueError
        assert fastq.current_task() is outer


def test_in_async_code_what_is_awaited_or_started_sees_it() -> None:
    def get_id() -> int:
        return fastq.current_task().id

    async def handle() -> list[int]:
        return [get_id(), await asyncio.create_task(asyncio.to_thread(get_id))]

    async def main() -> list[list[int]]:
        with task_context(id=9):
            return list(await asyncio.gather(handle(), handle()))

    assert asyncio.run(main()) == [[9, 9], [9, 9]]


def test_tasks_of_two_coroutines_are_their_own() -> None:
    async def handle(id_: int) -> int:
        with task_context(id=id_):
            await asyncio.sleep(0)
            return fastq.current_task().id

    async def main() -> list[int]:
        return await asyncio.gather(*(handle(id_) for id_ in range(1, 5)))

    assert asyncio.run(main()) == [1, 2, 3, 4]


@pytest.mark.skipif(getattr(sys.flags, "thread_inherit_context", False), reason="threads inherit their context here")
def test_a_thread_of_ones_own_does_not_see_it() -> None:
    seen: list[Exception] = []

    def look() -> None:
        try:
            fastq.current_task()
        except fastq.TaskError as error:
            seen.append(error)

    thread = threading.Thread(target=look)
    with task_context():
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_models_come_back_as_models() -> None:
    with task_context("order", Order(3, ("a", "b"))) as task:
        assert task.payload == {"id": 3, "lines": ["a", "b"]}
        assert task.payload_as(Order) == Order(3, ("a", "b"))
    with task_context("order", {"id": "three"}) as task, pytest.raises(fastq.SkipRetry, match="does not fit Order"):
        task.payload_as(Order)


def test_bytes_are_raw() -> None:
    with task_context("t", b"\x00\xff") as task:
        assert task.payload == task.raw_payload == b"\x00\xff"


def test_it_can_be_cancelled_at_any_time() -> None:
    with task_context() as task:
        task.raise_if_cancelled()
        cancel(task)
        cancel(task)
        assert task.is_cancelled()
        with pytest.raises(fastq.TaskCancelled):
            task.raise_if_cancelled()
    with task_context(cancelled=True) as task:
        assert task.is_cancelled()


@pytest.mark.parametrize(
    "created_at",
    [
        datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999999, UTC),
        datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    ],
)
def test_the_time_of_its_enqueue(created_at: datetime) -> None:
    with task_context(created_at=created_at) as task:
        assert task.created_at == created_at
        assert task.created_at.tzinfo is UTC


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"type": ""}, fastq.SettingsError),
        ({"type": 7}, fastq.SettingsError),
        ({"queue": "x" * 256}, fastq.SettingsError),
        ({"id": 0}, fastq.SettingsError),
        ({"id": 2**63}, fastq.SettingsError),
        ({"id": True}, fastq.SettingsError),
        ({"attempt": 0}, fastq.SettingsError),
        ({"attempt": 4}, fastq.SettingsError),
        ({"attempt": "1"}, fastq.SettingsError),
        ({"max_attempts": 0}, fastq.SettingsError),
        ({"max_attempts": 32_768}, fastq.SettingsError),
        ({"cancelled": 1}, fastq.SettingsError),
        ({"created_at": datetime(2026, 1, 1)}, fastq.SettingsError),  # noqa: DTZ001 - that is it
        ({"created_at": "now"}, TypeError),
        ({"payload": object()}, fastq.PayloadError),
        ({"payload": float("nan")}, fastq.PayloadError),
    ],
)
def test_what_no_task_can_be_is_refused(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error), task_context(**given):
        pytest.fail("it was made")
    with pytest.raises(fastq.TaskError):
        fastq.current_task()


def test_only_tasks_of_tests_are_cancelled_so() -> None:
    with pytest.raises(TypeError):
        cancel("task")  # type: ignore[arg-type]


def test_a_made_task_can_not_be_completed_in_a_transaction() -> None:
    with task_context() as task, pytest.raises(fastq.CompletionError, match="was made for a test"):
        task.complete_tx(object())


def test_nor_can_it_on_a_loop() -> None:
    with task_context() as task, pytest.raises(fastq.CompletionError, match="was made for a test"):
        asyncio.run(task.acomplete_tx(object()))
