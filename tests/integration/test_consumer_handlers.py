"""Handlers: sync and async, what they see, what becomes of what they raise, and their limits."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from fastq import Consumer, Producer, Task, TaskInfo
from tests.support.consuming import errors, new_consumer, states, wait_for_states
from tests.support.waiting import wait_until

Make = Callable[..., Consumer]


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def make(dsn: str, migrated: str) -> Iterator[Make]:
    """Makes consumers; those that were started are stopped at the end."""
    made: list[Consumer] = []

    def new(**settings: Any) -> Consumer:
        made.append(new_consumer(dsn, migrated, **settings))
        return made[-1]

    yield new
    for consumer in made:
        if consumer._running is not None:
            consumer.stop(5)


def _sync_or_async(function: Callable[[TaskInfo], Any], *, is_async: bool) -> Callable[[TaskInfo], Any]:
    if not is_async:
        return function

    async def handler(task: TaskInfo) -> Any:
        await asyncio.sleep(0)
        return function(task)

    return handler


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@both
def test_each_task_runs_once(producer: Producer, make: Make, db: psycopg.Connection, is_async: bool) -> None:
    runs: Counter[int] = Counter()
    consumer = make()
    consumer.handler("t")(_sync_or_async(lambda task: runs.update([task.payload]), is_async=is_async))
    producer.enqueue_many(Task("t", number) for number in range(3000))
    consumer.start()
    wait_for_states(db, {"completed": 3000})
    assert runs == dict.fromkeys(range(3000), 1)
    wait_until(lambda: consumer.stats()["completed"] == 3000)
    stats = consumer.stats()
    assert (stats["started"], stats["failed"]) == (3000, 0)


@both
def test_what_a_handler_sees(producer: Producer, make: Make, db: psycopg.Connection, is_async: bool) -> None:
    seen: list[TaskInfo] = []
    consumer = make()
    consumer.handler("t")(_sync_or_async(seen.append, is_async=is_async))
    before = datetime.now(UTC)
    enqueued = producer.enqueue(Task("t", {"a": [1, "ä", None]}, queue="q", max_attempts=7))
    consumer.start()
    wait_for_states(db, {"completed": 1})
    [task] = seen
    assert (task.id, task.type, task.queue, task.attempt, task.max_attempts) == (enqueued.id, "t", "q", 1, 7)
    assert task.payload == {"a": [1, "ä", None]}
    assert task.payload is task.payload
    assert task.raw_payload == '{"a":[1,"ä",null]}'.encode()
    assert task.created_at.utcoffset() == timedelta(0)
    assert abs(task.created_at - before) < timedelta(minutes=5)
    # None of its fields can be changed.
    with pytest.raises(AttributeError):
        task.attempt = 2  # type: ignore[misc]


def test_bytes_come_as_bytes(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    seen: list[Any] = []
    consumer = make()
    consumer.handler("t")(lambda task: seen.append(task.payload))
    producer.enqueue(Task("t", b"\x00\xff"))
    consumer.start()
    wait_for_states(db, {"completed": 1})
    assert seen == [b"\x00\xff"]


@both
def test_a_failure_is_retried_and_kept(producer: Producer, make: Make, db: psycopg.Connection, is_async: bool) -> None:
    def handle(task: TaskInfo) -> None:
        if task.attempt < 3:
            raise ValueError(f"no {task.attempt}")

    consumer = make()
    consumer.handler("t")(_sync_or_async(handle, is_async=is_async))
    producer.enqueue(Task("t", max_attempts=5))
    consumer.start()
    wait_for_states(db, {"completed": 1})
    kept = errors(db)
    assert [(attempt, error) for attempt, error, _ in kept] == [(1, "ValueError: no 1"), (2, "ValueError: no 2")]
    for _, _, traceback in kept:
        assert traceback.startswith("Traceback (most recent call last):\n")
        assert "in handle" in traceback
        assert "fastq/_dispatch.py" not in traceback


@both
def test_the_last_failure_is_final(producer: Producer, make: Make, db: psycopg.Connection, is_async: bool) -> None:
    runs: list[int] = []

    def handle(task: TaskInfo) -> None:
        runs.append(task.attempt)
        raise ValueError("never")

    consumer = make()
    consumer.handler("t")(_sync_or_async(handle, is_async=is_async))
    producer.enqueue(Task("t", max_attempts=3))
    producer.enqueue(Task("t", max_attempts=1))
    consumer.start()
    wait_for_states(db, {"failed": 2})
    assert sorted(runs) == [1, 1, 2, 3]
    assert [error for _, error, _ in errors(db)] == ["ValueError: never"] * 4


class _Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no text")


@both
@pytest.mark.parametrize(
    ("raised", "kept"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (asyncio.CancelledError(), "CancelledError"),
        (_Unspeakable(), "_Unspeakable: (its text can't be had: str() raised RuntimeError)"),
        (ValueError("a\0b\udc00c"), "ValueError: a\ufffdb?c"),
    ],
    ids=["exit", "interrupt", "cancelled", "unspeakable", "unstorable"],
)
def test_whatever_is_raised_fails_its_attempt_alone(
    producer: Producer, make: Make, db: psycopg.Connection, is_async: bool, raised: BaseException, kept: str
) -> None:
    def handle(task: TaskInfo) -> None:
        if task.payload == 13:
            raise raised

    consumer = make()
    consumer.handler("t")(_sync_or_async(handle, is_async=is_async))
    producer.enqueue_many(Task("t", number, max_attempts=1) for number in range(50))
    consumer.start()
    wait_for_states(db, {"completed": 49, "failed": 1})
    assert [error for _, error, _ in errors(db)] == [kept]
    producer.enqueue(Task("t", 0))
    wait_for_states(db, {"completed": 50, "failed": 1})


def test_ten_megabytes_of_error_are_cut(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    def handle(task: TaskInfo) -> None:
        raise ValueError("x" * 10_000_000)

    consumer = make(traceback_limit=1000)
    consumer.handler("t")(handle)
    producer.enqueue(Task("t", max_attempts=1))
    consumer.start()
    wait_for_states(db, {"failed": 1})
    [(_, error, traceback)] = errors(db)
    assert len(error) < 10_000
    assert len(traceback) <= 1000


def test_the_retry_policy_says_when(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    asked: list[tuple[int, str]] = []

    class Policy:
        def delay(self, task: TaskInfo, error: BaseException) -> timedelta:
            asked.append((task.attempt, str(error)))
            return timedelta(hours=1)

    def handle(task: TaskInfo) -> None:
        raise ValueError("no")

    consumer = make(retry_policy=Policy())
    consumer.handler("t")(handle)
    producer.enqueue(Task("t"))
    consumer.start()
    row = wait_until(
        lambda: db.execute(
            "SELECT kind, attempts, run_at - clock_timestamp() FROM tasks WHERE kind = 'retrying'"
        ).fetchone()
    )
    assert row is not None
    assert row[:2] == ("retrying", 1)
    assert timedelta(minutes=59) < row[2] <= timedelta(hours=1)
    assert asked == [(1, "no")]


def test_payloads_that_a_handler_can_not_use_are_failures(
    producer: Producer, make: Make, db: psycopg.Connection
) -> None:
    db.execute("SELECT 1")
    consumer = make()
    consumer.handler("t")(lambda task: task.payload["missing"])
    producer.enqueue(Task("t", {}, max_attempts=1))
    consumer.start()
    wait_for_states(db, {"failed": 1})
    assert [error for _, error, _ in errors(db)] == ["KeyError: 'missing'"]


def test_a_look_at_the_payload_lets_no_other_thread_run(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    """Else another one would begin its task there, and a worker that is stopped then has two that are neither claimed nor running."""
    turns = 0
    between: set[int] = set()
    over = threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            time.sleep(0)

    def handle(task: TaskInfo) -> None:
        before = turns
        assert task.payload == {"a": 1}
        between.add(turns - before)

    consumer = make(concurrency=1)
    consumer.handler("t")(handle)
    producer.enqueue_many(Task("t", {"a": 1}, max_attempts=1) for _ in range(5_000))
    other = threading.Thread(target=take_turns)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        other.start()
        consumer.start()
        wait_for_states(db, {"completed": 5_000})
    finally:
        sys.setswitchinterval(interval)
        over.set()
        other.join()
    assert between == {0}


# --- what is taken ---------------------------------------------------------------------------------


def test_only_types_with_a_handler_are_taken(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    consumer = make()
    consumer.handler("mine")(lambda _: None)
    producer.enqueue_many([Task("other", number) for number in range(50)] + [Task("mine")])
    consumer.start()
    wait_for_states(db, {"completed": 1, "pending": 50})
    consumer.stop()
    assert db.execute("SELECT max(attempts) FROM tasks WHERE type = 'other'").fetchone() == (0,)


def test_only_the_named_queues_are_taken(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    consumer = make(queues=["a", "b"])
    consumer.handler("t")(lambda _: None)
    producer.enqueue_many(Task("t", queue=queue) for queue in ("a", "b", "c", "default"))
    consumer.start()
    wait_for_states(db, {"completed": 2, "pending": 2})
    consumer.stop()
    assert {row[0] for row in db.execute("SELECT queue FROM tasks WHERE state = 'completed'")} == {"a", "b"}


def test_a_task_enqueued_later_is_announced(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    consumer = make(poll_interval=30)
    consumer.handler("t")(lambda _: None)
    consumer.start()
    for count in range(1, 4):
        producer.enqueue(Task("t"))
        wait_for_states(db, {"completed": count})


def test_without_listening_it_polls(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    consumer = make(listen=False)
    consumer.handler("t")(lambda _: None)
    consumer.start()
    producer.enqueue(Task("t"))
    wait_for_states(db, {"completed": 1})


def test_a_delayed_task_starts_at_its_time(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    started: list[datetime] = []
    consumer = make(poll_interval=1)
    consumer.handler("t")(lambda _: started.append(datetime.now(UTC)))
    consumer.start()
    at = datetime.now(UTC) + timedelta(seconds=2)
    producer.enqueue(Task("t", run_at=at))
    wait_for_states(db, {"completed": 1})
    assert timedelta(0) <= started[0] - at < timedelta(seconds=5)


# --- limits ----------------------------------------------------------------------------------------


class _Gauge:
    """How many are inside at once, at most."""

    def __init__(self, *, release_at: int) -> None:
        self._lock = threading.Lock()
        self.now = 0
        self.most = 0
        self.full = threading.Event()
        self.go = threading.Event()
        self._release_at = release_at

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self._release_at:
                self.full.set()
        try:
            yield
        finally:
            with self._lock:
                self.now -= 1


@both
@pytest.mark.parametrize(("settings", "workers", "wanted"), [({"concurrency": 4}, None, 4), ({}, 3, 3)])
def test_no_more_run_at_once_than_the_limit(
    producer: Producer,
    make: Make,
    db: psycopg.Connection,
    is_async: bool,
    settings: dict[str, int],
    workers: int | None,
    wanted: int,
) -> None:
    gauge = _Gauge(release_at=wanted)

    def handle(task: TaskInfo) -> None:
        with gauge.inside():
            assert gauge.go.wait(20)

    async def ahandle(task: TaskInfo) -> None:
        with gauge.inside():
            assert await asyncio.to_thread(gauge.go.wait, 20)

    consumer = make(**settings)
    consumer.handler("t", workers=workers)(ahandle if is_async else handle)
    producer.enqueue_many(Task("t") for _ in range(20))
    consumer.start()
    assert gauge.full.wait(20)
    gauge.go.set()
    wait_for_states(db, {"completed": 20})
    assert gauge.most == wanted


def test_a_type_at_its_limit_leaves_the_others_their_slots(
    producer: Producer, make: Make, db: psycopg.Connection
) -> None:
    release = threading.Event()
    consumer = make(concurrency=4)
    consumer.handler("slow", workers=2)(lambda _: release.wait(20))
    consumer.handler("fast")(lambda _: None)
    producer.enqueue_many(Task("slow") for _ in range(500))
    consumer.start()
    wait_until(lambda: consumer.stats()["started"] == 2 or states(db).get("running"))
    producer.enqueue_many(Task("fast") for _ in range(200))
    wait_until(lambda: states(db).get("completed", 0) >= 200)
    release.set()
    wait_for_states(db, {"completed": 700})


@both
def test_an_attempt_that_takes_too_long_ends(
    producer: Producer, make: Make, db: psycopg.Connection, is_async: bool
) -> None:
    release = threading.Event()
    cancelled: list[int] = []

    def handle(task: TaskInfo) -> None:
        if task.attempt == 1:
            release.wait(20)

    async def ahandle(task: TaskInfo) -> None:
        if task.attempt == 1:
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                cancelled.append(task.attempt)
                raise

    consumer = make()
    consumer.handler("t", timeout=0.3)(ahandle if is_async else handle)
    consumer.handler("other")(lambda _: None)
    producer.enqueue(Task("t"))
    consumer.start()
    wait_for_states(db, {"completed": 1})
    [(attempt, error, _)] = errors(db)
    assert attempt == 1
    assert "0.3 s" in error
    assert cancelled == ([1] if is_async else [])
    # The late end of a sync handler counts for nothing.
    release.set()
    producer.enqueue(Task("other"))
    wait_for_states(db, {"completed": 2})
    assert len(errors(db)) == 1


def test_a_coroutine_that_swallows_its_cancellation_counts_for_nothing(
    producer: Producer, make: Make, db: psycopg.Connection
) -> None:
    async def stubborn(task: TaskInfo) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(20)

    consumer = make()
    consumer.handler("t", timeout=0.2)(stubborn)
    producer.enqueue(Task("t", max_attempts=1))
    consumer.start()
    wait_for_states(db, {"failed": 1})
    assert len(errors(db)) == 1


# --- contexts and loops ----------------------------------------------------------------------------

_variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


@both
def test_what_a_handler_sets_in_its_context_is_its_own(
    producer: Producer, make: Make, db: psycopg.Connection, is_async: bool
) -> None:
    seen: list[int] = []

    def handle(task: TaskInfo) -> None:
        seen.append(_variable.get())
        _variable.set(task.id)

    consumer = make(concurrency=2)
    consumer.handler("t")(_sync_or_async(handle, is_async=is_async))
    producer.enqueue_many(Task("t") for _ in range(100))
    consumer.start()
    wait_for_states(db, {"completed": 100})
    assert seen == [0] * 100


def test_async_handlers_share_a_loop_of_their_own(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()
    threads: set[str] = set()

    async def handle(task: TaskInfo) -> None:
        loops.add(asyncio.get_running_loop())
        threads.add(threading.current_thread().name)
        # What needs a current task works.
        async with asyncio.timeout(5):
            await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(lambda: None))

    consumer = make()
    consumer.handler("t")(handle)
    producer.enqueue_many(Task("t") for _ in range(50))
    consumer.start()
    wait_for_states(db, {"completed": 50})
    assert len(loops) == 1
    assert threads == {"fastq-loop"}


def test_handlers_of_all_kinds(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    import functools  # noqa: PLC0415 - only here

    class Object:
        async def __call__(self, task: TaskInfo) -> None:
            await asyncio.sleep(0)

    class Methods:
        def method(self, task: TaskInfo) -> None: ...
        async def amethod(self, task: TaskInfo) -> None:
            await asyncio.sleep(0)

    async def two(extra: int, task: TaskInfo) -> None:
        await asyncio.sleep(0)

    kinds: dict[str, Callable[[TaskInfo], object]] = {
        "lambda": lambda task: task.id,
        "object": Object(),
        "method": Methods().method,
        "amethod": Methods().amethod,
        "partial": functools.partial(two, 1),
    }
    consumer = make()
    for name, handler in kinds.items():
        consumer.handler(name)(handler)
    consumer.add_handler("said", lambda task: two(1, task), is_async=True)
    producer.enqueue_many(Task(name, max_attempts=1) for name in [*kinds, "said"])
    consumer.start()
    wait_for_states(db, {"completed": len(kinds) + 1})


def test_a_handler_may_enqueue(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    def first(task: TaskInfo) -> None:
        producer.enqueue(Task("second", task.payload))

    async def second(task: TaskInfo) -> None:
        await producer.aenqueue(Task("third", task.payload))

    consumer = make()
    consumer.handler("first")(first)
    consumer.handler("second")(second)
    consumer.handler("third")(lambda _: None)
    producer.enqueue_many(Task("first", number) for number in range(30))
    consumer.start()
    wait_for_states(db, {"completed": 90})


def test_failures_are_in_the_log(
    producer: Producer, make: Make, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fastq")

    def handle(task: TaskInfo) -> None:
        raise ValueError("no")

    consumer = make()
    consumer.handler("t")(handle)
    id_ = producer.enqueue(Task("t", {"secret": "hunter2"}, max_attempts=1)).id
    consumer.start()
    wait_for_states(db, {"failed": 1})
    assert f"task {id_} (t) raised in attempt 1 of 1 and failed for good: ValueError: no" in caplog.text
    assert "hunter2" not in caplog.text


def test_an_async_generator_can_be_used_in_a_handler(producer: Producer, make: Make, db: psycopg.Connection) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    async def handle(task: TaskInfo) -> None:
        async for _ in numbers():
            return

    consumer = make()
    consumer.handler("t")(handle)
    producer.enqueue(Task("t"))
    consumer.start()
    wait_for_states(db, {"completed": 1})
