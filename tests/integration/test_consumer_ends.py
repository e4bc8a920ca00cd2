"""How a consumer ends: by signals, at the interpreter's end, in a forked child, and when a part of it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest

from fastq import Consumer, ConsumerError, Producer, Task, TaskInfo
from fastq._running import Running
from tests.support.consuming import new_consumer, run_python, start_python, states, wait_for_states
from tests.support.waiting import wait_until


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def consumer(dsn: str, migrated: str) -> Iterator[Consumer]:
    """One with a sync and an async handler of its own types, which do nothing."""
    consumer = new_consumer(dsn, migrated)
    consumer.handler("sync")(lambda _: None)

    @consumer.handler("async")
    async def handle(task: TaskInfo) -> None: ...

    yield consumer
    if consumer._running is not None and consumer._running.own_loop:
        consumer.stop(5)


def _consumers(db: psycopg.Connection) -> int:
    row = db.execute("SELECT count(*) FROM consumer").fetchone()
    assert row is not None
    return int(row[0])


# --- signals ---------------------------------------------------------------------------------------

_RUN = """
import asyncio, sys, threading, time
import fastq
consumer = fastq.Consumer({dsn!r}, schema={schema!r}, stop_timeout=20)

@consumer.handler("sync")
def handle(task):
    print("started", flush=True)
    time.sleep(task.payload)
    print("ended", flush=True)

@consumer.handler("async")
async def ahandle(task):
    print("started", flush=True)
    try:
        await asyncio.sleep(task.payload)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise
    print("ended", flush=True)

{run}
print("returned", flush=True)
"""
_SYNC_RUN = "consumer.run()"
_ASYNC_RUN = "asyncio.run(consumer.arun())"

runs = pytest.mark.parametrize("run", [_SYNC_RUN, _ASYNC_RUN], ids=["run", "arun"])
kinds = pytest.mark.parametrize("kind", ["sync", "async"])


def _start(dsn: str, schema: str, run: str) -> subprocess.Popen[str]:
    return start_python(_RUN.format(dsn=dsn, schema=schema, run=run))


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@runs
@kinds
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_the_first_signal_drains(
    producer: Producer,
    dsn: str,
    migrated: str,
    db: psycopg.Connection,
    run: str,
    kind: str,
    number: signal.Signals,
) -> None:
    producer.enqueue(Task(kind, 1.0))
    with _start(dsn, migrated, run) as process:
        assert _line(process) == "started"
        process.send_signal(number)
        assert _line(process) == "ended"
        assert _line(process) == "returned"
        assert process.wait(10) == 0
    assert states(db) == {"completed": 1}
    assert _consumers(db) == 0


@runs
@kinds
def test_the_second_signal_gives_up(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection, run: str, kind: str
) -> None:
    producer.enqueue(Task(kind, 60))
    with _start(dsn, migrated, run) as process:
        assert _line(process) == "started"
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: db.execute("SELECT bool_and(stopping) FROM consumer").fetchone() == (True,))
        process.send_signal(signal.SIGTERM)
        if kind == "async":
            assert _line(process) == "cancelled"
        assert _line(process) == "returned"
        assert process.wait(15) == 0
    assert states(db).get("completed") is None


def test_run_off_the_main_thread_works_until_it_is_stopped(
    producer: Producer, consumer: Consumer, db: psycopg.Connection
) -> None:
    thread = threading.Thread(target=consumer.run)
    thread.start()
    producer.enqueue(Task("async"))
    wait_for_states(db, {"completed": 1})
    consumer.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_a_stop_beside_a_start_that_is_refused_changes_nothing(
    producer: Producer, consumer: Consumer, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later stop drains as if there had been none."""
    at_start, go_on = threading.Event(), threading.Event()
    refused: list[BaseException] = []

    def stop() -> None:
        assert at_start.wait(30)
        try:
            consumer.stop()
        except BaseException as error:  # noqa: BLE001 looked at below
            refused.append(error)
        go_on.set()

    begin = Running.begin

    def begin_late(running: Running) -> None:
        at_start.set()
        assert go_on.wait(30)
        begin(running)

    monkeypatch.setattr(Running, "begin", begin_late)
    stopping = threading.Thread(target=stop)
    stopping.start()
    consumer.start()
    stopping.join(30)
    assert len(refused) == 1
    assert consumer._running is not None
    assert not consumer._running._is_stopping
    producer.enqueue(Task("sync"))
    wait_for_states(db, {"completed": 1})
    consumer.stop()


def test_a_signal_to_a_run_that_another_thread_stops_waits_for_that(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    """It is the first to this process: the handler has its time."""
    consumer = new_consumer(dsn, migrated, stop_timeout=60)
    started, release, signalled = threading.Event(), threading.Event(), threading.Event()

    @consumer.handler("t")
    def handle(_: TaskInfo) -> None:
        started.set()
        assert release.wait(60)

    def stop_and_signal() -> None:
        assert started.wait(30)
        stopping = threading.Thread(target=consumer.stop)
        stopping.start()
        wait_until(lambda: consumer._running is not None and consumer._running._is_stopping)
        signal.raise_signal(signal.SIGTERM)
        signalled.set()
        # Longer than what an engine has that was given up, without which its handler would be left behind here.
        stopping.join(6.5)
        assert stopping.is_alive()
        release.set()
        stopping.join(30)

    producer.enqueue(Task("t"))
    other = threading.Thread(target=stop_and_signal)
    other.start()
    consumer.run()
    assert signalled.is_set()
    assert release.is_set(), "it returned beside its handler"
    other.join(30)
    assert states(db) == {"completed": 1}


# --- the interpreter's end, and forks --------------------------------------------------------------


@pytest.mark.parametrize("handler", ["handle", "ahandle"])
def test_an_interpreter_that_ends_without_a_stop_does_not_hang(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection, handler: str
) -> None:
    producer.enqueue(Task("t"))
    code = f"""
import asyncio, threading, time
import fastq
consumer = fastq.Consumer({dsn!r}, schema={migrated!r})
started = threading.Event()
def handle(task):
    started.set()
    time.sleep(60)
async def ahandle(task):
    started.set()
    await asyncio.sleep(60)
consumer.add_handler("t", {handler})
consumer.start()
started.wait(20)
"""
    done = run_python(code, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "1 handlers did not end in time" in done.stderr
    assert states(db).get("completed") is None


def test_an_interpreter_that_ends_flushes_what_is_done(
    producer: Producer, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    producer.enqueue_many(Task("t") for _ in range(100))
    code = f"""
import threading
import fastq
consumer = fastq.Consumer({dsn!r}, schema={migrated!r})
count, all_ran = 0, threading.Event()
@consumer.handler("t", workers=1)
def handle(task):
    global count
    count += 1
    if count == 100:
        all_ran.set()
consumer.start()
all_ran.wait(20)
"""
    done = run_python(code, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert states(db) == {"completed": 100}
    assert _consumers(db) == 0


def test_an_uncaught_error_ends_the_process(dsn: str, migrated: str) -> None:
    code = f"""
import fastq
consumer = fastq.Consumer({dsn!r}, schema={migrated!r})
consumer.handler("t")(print)
consumer.start()
raise ZeroDivisionError
"""
    done = run_python(code, timeout=30)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told(dsn: str, migrated: str) -> None:
    code = f"""
import os, sys
import fastq
consumer = fastq.Consumer({dsn!r}, schema={migrated!r})
consumer.handler("t")(print)
ready = fastq.Consumer({dsn!r}, schema={migrated!r})
ready.handler("t")(print)
consumer.start()
child = os.fork()
if child == 0:
    for call in (consumer.stop, consumer.start, consumer.run, consumer.stats):
        try:
            call()
        except fastq.ConsumerError as error:
            assert "fork" in str(error), error
        else:
            sys.exit(3)
    # One that was only made before the fork may be started after it.
    with ready:
        pass
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert consumer.stats()["failed"] == 0
consumer.stop()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = run_python(code, timeout=60)
    assert done.returncode == 0, done.stderr


# --- when a part of it dies ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "arun", "stop", "with"])
def test_an_engine_that_ends_by_itself_is_an_error(consumer: Consumer, how: str) -> None:
    def end() -> None:
        wait_until(lambda: consumer._running is not None and consumer.stats() is not None)
        assert consumer._running is not None
        consumer._running.engine.abandon()

    def run_with() -> None:
        with consumer:
            wait_until(lambda: consumer._running is not None and consumer._running._died)

    def stop() -> None:
        consumer.start()
        wait_until(lambda: consumer._running is not None and consumer._running._died)
        consumer.stop()

    ways: dict[str, Callable[[], object]] = {
        "run": consumer.run,
        "arun": lambda: asyncio.run(consumer.arun()),
        "stop": stop,
        "with": run_with,
    }
    ender = threading.Thread(target=end)
    ender.start()
    with pytest.raises(ConsumerError, match="ended by itself"):
        ways[how]()
    ender.join()
    consumer.stop()


def test_an_engine_that_ends_by_itself_says_why(
    producer: Producer, consumer: Consumer, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    # Somebody's change of the schema: what the engine reads has another type than it knows.
    db.execute("ALTER TABLE ready ALTER COLUMN track TYPE integer")
    producer.enqueue(Task("sync"))
    consumer.start()
    wait_until(lambda: consumer._running is not None and consumer._running._died)
    with pytest.raises(
        ConsumerError, match="ended by itself: the I/O thread panicked: error retrieving column"
    ) as caught:
        consumer.stop()
    assert isinstance(caught.value.__cause__, ConsumerError)
    assert "the I/O thread panicked" in caplog.text


def test_a_loop_that_dies_takes_the_consumer_with_it(
    producer: Producer, dsn: str, migrated: str, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = new_consumer(dsn, migrated)
    left: set[asyncio.Task[None]] = set()

    async def leave() -> None:
        raise SystemExit(7)

    @consumer.handler("t")
    async def handle(task: TaskInfo) -> None:
        # Of a task that is not the handler's own, asyncio itself takes it for the end.
        left.add(asyncio.get_running_loop().create_task(leave()))
        await asyncio.Event().wait()

    producer.enqueue(Task("t"))
    with pytest.raises(ConsumerError, match="ended by itself") as caught:
        consumer.run()
    assert isinstance(caught.value.__cause__, SystemExit)
    assert "the event loop of the async handlers died" in caplog.text
    assert isinstance(left.pop().exception(), SystemExit)  # retrieved: asyncio has nothing to log when it goes


def test_log_records_of_the_engine_come_out_of_logging(
    consumer: Consumer, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastq")
    consumer.start()
    wait_until(lambda: "leads from here on" in caplog.text)
    consumer.stop()
    assert {record.name.partition(".")[0] for record in caplog.records if "leads" in record.getMessage()} == {"fastq"}
