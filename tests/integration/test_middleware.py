"""What surrounds handlers: its order, what it sees and decides, and the task that any code under it can ask for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import fastq
from fastq import App, Consumer, ConsumerError, SettingsError, SkipRetry, Snooze, Task, TaskError, TaskInfo
from tests.support.consuming import errors, new_consumer, states
from tests.support.lab import QUICK, Lab
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.fixture
def make(lab: Lab) -> Iterator[Callable[..., Consumer]]:
    made: list[Consumer] = []

    def new(**settings: Any) -> Consumer:
        made.append(new_consumer(lab.dsn, lab.schema, **(QUICK | settings)))
        return made[-1]

    yield new
    for consumer in made:
        if consumer._running is not None:
            consumer.stop(5)


def _handler(act: Callable[[TaskInfo], Any], *, is_async: bool) -> Callable[[TaskInfo], Any]:
    async def handler(task: TaskInfo) -> Any:
        await asyncio.sleep(0)
        return act(task)

    return handler if is_async else act


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@both
def test_the_first_is_outermost_and_a_types_own_are_inside(
    lab: Lab, make: Callable[..., Consumer], is_async: bool
) -> None:
    seen: list[str] = []

    def named(name: str) -> Callable[[TaskInfo], Iterator[None]]:
        def middleware(task: TaskInfo) -> Iterator[None]:
            seen.append(f"{name} before {task.payload}")
            yield
            seen.append(f"{name} after")

        return middleware

    consumer = make()
    consumer.use(named("one"))
    consumer.handler("t", middleware=[named("three"), named("four")])(
        _handler(lambda task: seen.append("handler"), is_async=is_async)
    )
    # Around handlers that are there already, too.
    consumer.use(named("two"))
    consumer.start()
    lab.enqueue("x")
    lab.wait_for(completed=1)
    order = ["one", "two", "three", "four"]
    assert seen == [f"{n} before x" for n in order] + ["handler"] + [f"{n} after" for n in reversed(order)]


@both
def test_what_a_handler_raises_is_raised_where_it_yields_and_what_it_raises_counts(
    lab: Lab, make: Callable[..., Consumer], is_async: bool
) -> None:
    def act(task: TaskInfo) -> None:
        raise ValueError(task.payload)

    @contextlib.contextmanager
    def forgiving(task: TaskInfo) -> Iterator[None]:
        with contextlib.suppress(ValueError) if task.payload == "forgive" else contextlib.nullcontext():
            yield

    def translate(task: TaskInfo) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if str(error) == "translate":
                raise SkipRetry("translated") from error
            raise

    def refuse(task: TaskInfo) -> Iterator[None]:
        if task.payload == "later":
            raise Snooze(3600)
        yield

    consumer = make()
    for one in (forgiving, translate, refuse):
        consumer.use(one)
    consumer.handler("t")(_handler(act, is_async=is_async))
    consumer.start()
    lab.enqueue("forgive", "translate", "later", "plain", max_attempts=1)
    wait_until(lambda: states(lab.db) == {"completed": 1, "failed": 2, "pending": 1})
    assert sorted(error for _, error, _ in errors(lab.db)) == ["SkipRetry: translated", "ValueError: plain"]


def test_async_middleware_goes_around_async_handlers_alone(lab: Lab, make: Callable[..., Consumer]) -> None:
    seen: list[str] = []

    async def middleware(task: TaskInfo) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        seen.append("before")
        yield
        seen.append("after")

    async def handler(task: TaskInfo) -> None:
        seen.append("handler")

    consumer = make()
    consumer.use(middleware)
    consumer.handler("t")(handler)
    consumer.handler("u")(lambda task: None)
    with pytest.raises(SettingsError, match="is async and can't go around the sync handler"):
        consumer.start()
    other = make()
    other.use(middleware)
    other.handler("t")(handler)
    other.start()
    lab.enqueue(None)
    lab.wait_for(completed=1)
    assert seen == ["before", "handler", "after"]


def test_what_is_no_middleware_is_refused(make: Callable[..., Consumer]) -> None:
    async def coroutine(task: TaskInfo) -> None: ...

    consumer = make()
    for bad in (5, "log", None, coroutine):
        with pytest.raises(SettingsError, match="middleware is"):
            consumer.use(bad)  # type: ignore[type-var]
        with pytest.raises(SettingsError, match="middleware is"):
            consumer.handler("t", middleware=[bad])(lambda task: None)  # type: ignore[list-item]
    consumer.handler("t")(lambda task: None)
    consumer.start()
    with pytest.raises(ConsumerError, match="came too late"):
        consumer.use(lambda task: contextlib.nullcontext())


def test_an_app_has_middleware_for_all_and_for_one(lab: Lab) -> None:
    app = App(lab.dsn, schema=lab.schema)
    seen: list[tuple[str, str]] = []

    def one(task: TaskInfo) -> Iterator[None]:
        seen.append(("one", task.type))
        yield

    @app.use_middleware
    def every(task: TaskInfo) -> Iterator[None]:
        seen.append(("every", task.type))
        yield

    @app.task("a", middleware=[one])
    def a(n: int) -> None: ...

    @app.task("b")
    async def b(n: int) -> None: ...

    a.enqueue(n=1)
    b.enqueue(n=2)
    with app.consumer(poll_interval=0.2):
        lab.wait_for(completed=2)
    app.producer.close()
    assert sorted(seen) == [("every", "a"), ("every", "b"), ("one", "a")]


# --- the current task ------------------------------------------------------------------------------


@both
def test_the_current_task_is_seen_by_handlers_middleware_hooks_and_what_they_start(
    lab: Lab, make: Callable[..., Consumer], is_async: bool
) -> None:
    seen: list[tuple[str, int]] = []

    def note(what: str) -> None:
        seen.append((what, fastq.current_task().id))

    def act(task: TaskInfo) -> None:
        note("handler")
        raise ValueError

    async def act_async(task: TaskInfo) -> None:
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(3)))
        await asyncio.to_thread(note, "thread")
        note("handler")
        raise ValueError

    def middleware(task: TaskInfo) -> Iterator[None]:
        note("middleware")
        yield

    consumer = make(concurrency=8)
    consumer.use(middleware)
    consumer.handler("t")(act_async if is_async else act)
    consumer.start()
    ids = lab.enqueue(count=50, max_attempts=1)
    lab.wait_for(failed=50)
    for what in ("handler", "middleware", *(["thread"] if is_async else [])):
        assert sorted(id_ for name, id_ in seen if name == what) == sorted(ids), what


def test_elsewhere_there_is_none(lab: Lab, make: Callable[..., Consumer]) -> None:
    with pytest.raises(TaskError, match="no task is running here"):
        fastq.current_task()
    seen: list[object] = []

    def look() -> None:
        try:
            seen.append(fastq.current_task())
        except TaskError:
            seen.append(None)

    def handler(task: TaskInfo) -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    consumer = make()
    consumer.handler("t")(handler)
    consumer.start()
    lab.enqueue(None)
    lab.wait_for(completed=1)
    assert seen == [None]
    with pytest.raises(TaskError, match="no task is running here"):
        fastq.current_task()


def test_an_idle_thread_keeps_no_payload_in_memory(lab: Lab, make: Callable[..., Consumer]) -> None:
    class Kept:
        pass

    kept: list[weakref.ref[Kept]] = []

    def handler(task: TaskInfo) -> None:
        value = Kept()
        task.payload["kept"] = value
        kept.append(weakref.ref(value))

    consumer = make(concurrency=1)
    consumer.handler("t")(handler)
    consumer.start()
    lab.producer.enqueue(Task("t", {}))
    lab.wait_for(completed=1)

    def is_gone() -> bool:
        gc.collect()
        return kept[0]() is None

    wait_until(is_gone)
