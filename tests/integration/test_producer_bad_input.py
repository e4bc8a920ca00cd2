"""Bad input: each its own clear error before anything is written, with the index of the task to blame."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest

from fastq import Enqueued, EnqueueError, PayloadError, Producer, SettingsError, Task


def _task(**changes: object) -> Task:
    """A good task, made bad behind the constructor's back."""
    task = Task("t")
    for name, value in changes.items():
        setattr(task, name, value)
    return task


class _Odd:
    """Not JSON."""


class _Recursive(dict[str, object]):
    def __init__(self) -> None:
        super().__init__()
        self["self"] = self


BAD: dict[str, tuple[Callable[[], Task], type[EnqueueError], str]] = {
    "no type": (lambda: Task(""), EnqueueError, "type"),
    "long type": (lambda: Task("x" * 256), EnqueueError, r"type.*255"),
    "type with NUL": (lambda: Task("a\0b"), EnqueueError, r"type.*NUL"),
    "type with a surrogate": (lambda: Task("a\ud800"), EnqueueError, r"type.*surrogate"),
    "type that is no str": (lambda: _task(type=5), EnqueueError, r"type.*str.*int"),
    "no queue": (lambda: Task("t", queue=""), EnqueueError, "queue"),
    "long queue": (lambda: Task("t", queue="x" * 256), EnqueueError, r"queue.*255"),
    "queue with NUL": (lambda: Task("t", queue="a\0"), EnqueueError, r"queue.*NUL"),
    "no token": (lambda: Task("t", idempotency_token=""), EnqueueError, "idempotency_token"),
    "long token": (lambda: Task("t", idempotency_token="x" * 256), EnqueueError, r"idempotency_token.*255"),
    "token with NUL": (lambda: Task("t", idempotency_token="a\0"), EnqueueError, r"idempotency_token.*NUL"),
    "token that is no str": (lambda: _task(idempotency_token=17), EnqueueError, r"idempotency_token.*str"),
    "negative delay": (lambda: _task(delay=-1.0), EnqueueError, "delay"),
    "delay without end": (lambda: _task(delay=math.inf), EnqueueError, "delay"),
    "delay that is none": (lambda: _task(delay="soon"), EnqueueError, "delay"),
    "max_attempts of 0": (lambda: _task(max_attempts=0), EnqueueError, "max_attempts"),
    "max_attempts of many": (lambda: _task(max_attempts=40_000), EnqueueError, "max_attempts"),
    "run_at that is none": (lambda: _task(run_at="2030-01-01"), EnqueueError, "run_at"),
    "an object": (lambda: Task("t", {"a": [1, _Odd()]}), PayloadError, r"payload\.a\[1\].*_Odd"),
    "a set": (lambda: Task("t", {1, 2}), PayloadError, r"payload.*set"),
    "NaN": (lambda: Task("t", {"x": math.nan}), PayloadError, r"payload\.x.*NaN"),
    "infinity": (lambda: Task("t", [-math.inf]), PayloadError, r"payload\[0\].*infinity"),
    "a key that is no str": (lambda: Task("t", {1: 2}), PayloadError, r"key.*int"),
    "a lone surrogate": (lambda: Task("t", "\udc00"), PayloadError, "surrogate"),
    "a payload that holds itself": (lambda: Task("t", _Recursive()), PayloadError, "inside"),
    "a payload over the limit": (lambda: Task("t", "x" * 1024 * 1024), PayloadError, r"limit|1,?048,?576"),
    "bytes over the limit": (lambda: Task("t", b"x" * (1024 * 1024 + 1)), PayloadError, r"limit|1,?048,?576"),
}

bad = pytest.mark.parametrize("name", BAD)


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated, iterable_timeout=1) as producer:
        yield producer


def _count(db: psycopg.Connection) -> int:
    row = db.execute("SELECT (SELECT count(*) FROM task) + (SELECT count(*) FROM delayed)").fetchone()
    assert row is not None
    return int(row[0])


@bad
def test_one(producer: Producer, db: psycopg.Connection, name: str) -> None:
    make, kind, message = BAD[name]
    calls: list[Callable[[Task], object]] = [producer.enqueue, lambda task: asyncio.run(producer.aenqueue(task))]
    for call in calls:
        with pytest.raises(kind, match=message) as caught:
            call(make())
        assert type(caught.value) is kind
        assert caught.value.committed is None
    assert _count(db) == 0


@bad
def test_many_name_the_index_and_write_nothing(producer: Producer, db: psycopg.Connection, name: str) -> None:
    make, kind, message = BAD[name]
    for index in (0, 7, 12_345):
        tasks = (make() if number == index else Task("t", number) for number in range(index + 5))
        with pytest.raises(kind, match=message) as caught:
            producer.enqueue_many(tasks)
        assert (caught.value.index, caught.value.committed) == (index, None)
        assert str(caught.value).startswith(f"task {index}: ")
    assert _count(db) == 0


def test_what_is_committed_stays_and_the_error_says_how_many(producer: Producer, db: psycopg.Connection) -> None:
    tasks = [Task("t", number) for number in range(25)] + [Task("t", math.nan)]
    with pytest.raises(PayloadError, match="20 tasks") as caught:
        producer.enqueue_many(tasks, commit_every=10)
    assert (caught.value.index, caught.value.committed) == (25, 20)
    assert _count(db) == 20


def test_what_is_no_task_in_many(producer: Producer, db: psycopg.Connection) -> None:
    with pytest.raises((EnqueueError, TypeError), match="dict"):
        producer.enqueue_many([Task("t"), {"type": "t"}])  # type: ignore[list-item]
    assert _count(db) == 0


@pytest.mark.parametrize("commit_every", [0, -1, 1.5, "10", True])
def test_commit_every_is_a_count(producer: Producer, commit_every: Any) -> None:
    with pytest.raises(SettingsError, match="commit_every is"):
        producer.enqueue_many([Task("t")], commit_every=commit_every)
    with pytest.raises(SettingsError, match="commit_every is"):
        asyncio.run(producer.aenqueue_many([Task("t")], commit_every=commit_every))


# --- iterables -------------------------------------------------------------------------------------


def _breaking(after: int, error: BaseException) -> Iterator[Task]:
    for number in range(after):
        yield Task("t", number)
    raise error


async def _abreaking(after: int, error: BaseException) -> AsyncIterator[Task]:
    for task in _breaking(after, error):
        yield task


@pytest.mark.parametrize("after", [0, 1, 20_000])
def test_an_iterable_that_raises_is_rolled_back(producer: Producer, db: psycopg.Connection, after: int) -> None:
    error = ZeroDivisionError("mine")
    calls: list[Callable[[], object]] = [
        lambda: producer.enqueue_many(_breaking(after, error)),
        lambda: asyncio.run(producer.aenqueue_many(_breaking(after, error))),
        lambda: asyncio.run(producer.aenqueue_many(_abreaking(after, error))),
    ]
    for call in calls:
        with pytest.raises(EnqueueError, match=r"the iterable raised ZeroDivisionError.*rolled back") as caught:
            call()
        assert caught.value.__cause__ is error
        assert caught.value.committed is None
    assert _count(db) == 0


def test_with_commit_every_an_iterable_that_raises_leaves_what_is_in(
    producer: Producer, db: psycopg.Connection
) -> None:
    error = ZeroDivisionError("mine")
    with pytest.raises(EnqueueError, match=r"ZeroDivisionError.*20 tasks") as caught:
        producer.enqueue_many(_breaking(25, error), commit_every=10)
    assert caught.value.committed == 20
    assert caught.value.__cause__ is error
    assert _count(db) == 20


def test_what_ends_the_process_is_rolled_back_and_goes_on(producer: Producer, db: psycopg.Connection) -> None:
    with pytest.raises(KeyboardInterrupt):
        producer.enqueue_many(_breaking(20_000, KeyboardInterrupt()))
    assert _count(db) == 0


def test_an_iterable_that_gives_nothing_is_rolled_back(producer: Producer, db: psycopg.Connection) -> None:
    silent = threading.Event()

    def slow() -> Iterator[Task]:
        for number in range(20_000):
            yield Task("t", number)
        silent.wait(3)
        yield Task("t")

    with pytest.raises(EnqueueError, match="nothing for 1 s"):
        producer.enqueue_many(slow())
    assert _count(db) == 0
    assert producer.enqueue(Task("t")).is_new


def test_an_async_iterable_that_gives_nothing_is_not_waited_for(producer: Producer, db: psycopg.Connection) -> None:
    async def silent() -> AsyncIterator[Task]:
        for number in range(20_000):
            yield Task("t", number)
        await asyncio.Event().wait()

    async def main() -> None:
        async with asyncio.timeout(10):
            with pytest.raises(EnqueueError, match="nothing for 1 s"):
                await producer.aenqueue_many(silent())

    asyncio.run(main())
    assert _count(db) == 0


def test_a_slow_iterable_that_gives_now_and_then_is_waited_for(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    pause = threading.Event()

    def slow() -> Iterator[Task]:
        for number in range(8):
            pause.wait(0.5)
            yield Task("t", number)

    with Producer(dsn, schema=migrated, iterable_timeout=3) as producer:
        assert len(producer.enqueue_many(slow())) == 8
    assert _count(db) == 8


def test_an_iterable_may_enqueue_itself(producer: Producer, db: psycopg.Connection) -> None:
    results: list[Enqueued] = []

    def nested() -> Iterator[Task]:
        for number in range(3):
            results.append(producer.enqueue(Task("inner", number)))
            yield Task("outer", number)

    assert len(producer.enqueue_many(nested())) == 3
    assert len(results) == 3
    assert _count(db) == 6
