"""What an app sets up around its worker: in order, before the first task and after the last, on the right loop, and when it fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import App, ConsumerError, Depends, SettingsError
from fastq._running import Running
from tests.support.consuming import errors, wait_for_states
from tests.support.waiting import wait_until


@pytest.fixture
def app(dsn: str, migrated: str) -> Iterator[App]:
    app = App(dsn, schema=migrated)
    yield app
    app.producer.close()


def test_hooks_go_around_the_handlers(app: App, db: psycopg.Connection) -> None:
    log: list[str] = []
    gate = threading.Event()
    app.on_startup(lambda: log.append("first"))

    @app.lifespan
    def around() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("leave")

    app.on_startup(lambda: log.append("last"))
    app.on_shutdown(lambda: log.append("down 1"))
    app.on_shutdown(lambda: log.append("down 2"))

    @app.task("t")
    def work() -> None:
        log.append("begin")
        assert gate.wait(30)
        log.append("end")

    work.enqueue()
    consumer = app.consumer(poll_interval=0.2)
    consumer.start()
    wait_until(lambda: "begin" in log)
    stopping = threading.Thread(target=consumer.stop)
    stopping.start()
    wait_until(lambda: db.execute("SELECT stopping FROM consumer").fetchone() == (True,))
    gate.set()
    stopping.join(30)
    assert log == ["first", "enter", "last", "begin", "end", "down 2", "down 1", "leave"]


class Pool:
    """A resource that knows where it is used."""

    def __init__(self) -> None:
        self.loop: Any = None
        self.uses: list[Any] = []
        self.is_open = True


def resources(made: list[Pool]) -> tuple[Any, Any]:
    def pool() -> Iterator[Pool]:
        found = Pool()
        made.append(found)
        yield found
        found.is_open = False

    async def apool() -> AsyncIterator[Pool]:
        found = Pool()
        found.loop = asyncio.get_running_loop()
        made.append(found)
        yield found
        assert asyncio.get_running_loop() is found.loop
        found.is_open = False

    return pool, apool


def make_tasks(app: App, made: list[Pool]) -> list[Any]:
    pool, apool = resources(made)

    @app.task("sync")
    def sync(n: int, db: Pool = Depends(pool)) -> None:
        assert db.is_open
        db.uses.append(n)

    @app.task("async")
    async def not_sync(n: int, *, db: Pool = Depends(pool), other: Pool = Depends(apool)) -> None:
        assert db.is_open
        assert other.loop is asyncio.get_running_loop()
        db.uses.append(n)

    return [sync, not_sync]


def test_functions_get_resources_once_a_worker(app: App, db: psycopg.Connection) -> None:
    made: list[Pool] = []
    tasks = make_tasks(app, made)
    app.producer.enqueue_many([each.task(n) for n in range(5) for each in tasks])
    for completed in (10, 11):
        with app.consumer(poll_interval=0.2):
            wait_for_states(db, {"completed": completed})
            assert len(made) == 2
        assert [each.is_open for each in made] == [False, False]
        assert sorted(made[0].uses) == (sorted([*range(5)] * 2) if completed == 10 else [7])
        made.clear()
        tasks[0].enqueue(7)


@pytest.mark.asyncio
async def test_async_resources_live_on_the_callers_loop(app: App, db: psycopg.Connection) -> None:
    made: list[Pool] = []
    [_, task] = make_tasks(app, made)
    await task.aenqueue(1)
    async with app.consumer(poll_interval=0.2):
        await asyncio.to_thread(wait_for_states, db, {"completed": 1})
        assert made[1].loop is asyncio.get_running_loop()
    assert [each.is_open for each in made] == [False, False]


def test_a_resource_is_no_part_of_the_payload(app: App, db: psycopg.Connection) -> None:
    made: list[Pool] = []
    [sync, _] = make_tasks(app, made)
    assert sync.task(1).payload == {"n": 1}
    for args, kwargs in (((1, "x"), {}), ((1,), {"db": "x"})):
        with pytest.raises(TypeError):
            sync.task(*args, **kwargs)
    mine = Pool()
    sync(3, mine)
    assert mine.uses == [3]
    app.producer.enqueue_many([type(sync.task(1))("sync", {"n": 1, "db": "theirs"})])
    with app.consumer(poll_interval=0.2):
        wait_for_states(db, {"failed": 1})
    [(attempt, error, _)] = errors(db)
    assert attempt == 1
    assert "got an unexpected keyword argument 'db'" in error


async def fail_async() -> None:
    raise ValueError("no database")


def fail() -> None:
    raise ValueError("no database")


@pytest.mark.parametrize("hook", [fail, fail_async])
def test_a_startup_that_fails_is_undone_and_no_task_begins(app: App, db: psycopg.Connection, hook: Any) -> None:
    log: list[str] = []

    @app.lifespan
    async def around() -> AsyncIterator[None]:
        log.append("enter")
        try:
            yield
        finally:
            log.append("leave")

    app.on_startup(hook)
    app.on_shutdown(lambda: log.append("down"))
    app.task("t")(lambda: log.append("ran")).enqueue()
    consumer = app.consumer()
    with pytest.raises(
        ConsumerError, match=r"startup hook fail\w* failed, so the worker did not start: ValueError: no"
    ) as error:
        consumer.start()
    assert isinstance(error.value.__cause__, ValueError)
    assert log == ["enter", "leave"]
    assert db.execute("SELECT count(*) FROM consumer").fetchone() == (0,)
    with pytest.raises(ConsumerError):
        asyncio.run(app.consumer().arun())
    assert log == ["enter", "leave"] * 2


@pytest.mark.parametrize("hook", [fail, fail_async])
def test_a_shutdown_that_fails_is_said_and_the_others_run(app: App, hook: Any) -> None:
    log: list[str] = []
    app.on_shutdown(lambda: log.append("down"))
    app.on_shutdown(hook)
    app.task("t")(lambda: None)
    consumer = app.consumer()
    consumer.start()
    with pytest.raises(ConsumerError, match="a shutdown hook failed: ValueError: no database"):
        consumer.stop()
    assert log == ["down"]
    consumer.stop()

    async def body() -> None:
        async with app.consumer():
            raise KeyError("the body's own")

    with pytest.raises(KeyError):
        asyncio.run(body())
    assert log == ["down"] * 2


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_stop_beside_the_end_of_a_run_waits_for_it(
    app: App, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    """Both take the consumer down: one does it, while the other is held, and both are told what failed."""
    both, down, gate = threading.Barrier(2), threading.Event(), threading.Event()
    downs: list[str] = []
    told: list[str] = []
    finish = Running.finish

    def finish_at_once(running: Running) -> None:
        both.wait(30)
        finish(running)

    def hook() -> None:
        downs.append("down")
        down.set()
        assert gate.wait(30)
        raise ValueError("no database")

    async def ahook() -> None:
        hook()

    def tell(end: Callable[[], None]) -> None:
        with pytest.raises(ConsumerError) as caught:
            end()
        assert gate.is_set()
        told.append(str(caught.value))

    monkeypatch.setattr(Running, "finish", finish_at_once)
    app.on_shutdown(ahook if is_async else hook)
    app.task("t")(lambda: None)
    consumer = app.consumer()
    running = threading.Thread(target=tell, args=(consumer.run,))
    running.start()
    wait_until(lambda: consumer._running is not None and consumer._running._housekeeper._thread.is_alive())
    stopping = threading.Thread(target=tell, args=(consumer.stop,))
    stopping.start()
    assert down.wait(30)
    assert running.is_alive()
    assert stopping.is_alive()
    gate.set()
    running.join(30)
    stopping.join(30)
    assert told == ["a shutdown hook failed: ValueError: no database"] * 2
    assert downs == ["down"]


def test_a_shutdown_hook_may_stop_its_consumer(app: App) -> None:
    downs: list[str] = []

    def hook() -> None:
        consumer.stop()
        downs.append("down")

    app.on_shutdown(hook)
    app.task("t")(lambda: None)
    consumer = app.consumer()
    consumer.start()
    consumer.stop()
    assert downs == ["down"]


def test_hooks_whose_loop_ends_are_given_up_at_once(app: App) -> None:
    """Not after the minute that shutdown hooks have."""
    left: set[asyncio.Task[None]] = set()

    async def leave() -> None:
        raise SystemExit(7)

    async def hook() -> None:
        left.add(asyncio.get_running_loop().create_task(leave()))
        await asyncio.Event().wait()

    app.on_shutdown(hook)
    app.task("t")(lambda: None)
    consumer = app.consumer()
    consumer.start()
    begun = time.monotonic()
    with pytest.raises(ConsumerError, match="ended by itself: 7"):
        consumer.stop()
    assert time.monotonic() - begun < 30
    assert isinstance(left.pop().exception(), SystemExit)  # retrieved: asyncio has nothing to log when it goes


@pytest.mark.parametrize("moment", ["closed", "queued"])
def test_hooks_that_come_as_their_loop_closes_are_refused(
    app: App, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async def hook() -> None: ...

    app.on_shutdown(hook)
    app.task("t")(lambda: None)
    consumer = app.consumer()
    consumer.start()
    running = consumer._running
    assert running is not None
    assert running._loop_thread is not None
    running._loop_thread.stop(30)
    if moment == "queued":
        # Handed over beside the loop's end, which does not come to it any more.
        never: concurrent.futures.Future[None] = concurrent.futures.Future()
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", lambda _work, _loop: never)
    with pytest.raises(ConsumerError, match="async hooks"):
        consumer.stop()


def test_a_start_that_fails_later_closes_what_was_opened(dsn: str, migrated: str) -> None:
    app = App(dsn, schema=f"{migrated}_not_there")
    log: list[str] = []

    @app.lifespan
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("leave")

    app.task("t")(lambda: None)
    with pytest.raises(Exception, match="not migrated"):
        app.consumer().start()
    assert log == ["enter", "leave"]


def test_the_worker_command_ends_with_its_reason(tmp_path: Path, dsn: str, migrated: str) -> None:
    (tmp_path / "tasks.py").write_text(
        f"import fastq\napp = fastq.App({dsn!r}, schema={migrated!r})\n"
        "@app.task('t')\ndef t(): ...\n"
        "@app.on_startup\nasync def connect():\n    raise OSError('the cache is away')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fastq", "worker", "tasks:app"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Error: startup hook connect failed, so the worker did not start: OSError: the cache is away" in done.stderr


def test_what_is_no_hook(app: App) -> None:
    wrong: Any = 5
    for call in (app.on_startup, app.on_shutdown, app.lifespan, Depends):
        with pytest.raises(SettingsError, match="must be a function without arguments"):
            call(wrong)
