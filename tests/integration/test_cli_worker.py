"""``fastq worker``: an app's tasks, until a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Producer, Task
from tests.support.consuming import states, wait_for_states
from tests.support.waiting import wait_until

_TASKS = """
import asyncio
import time
import fastq
app = fastq.App()
other = 5
class Box:
    inner = app

@app.task("sync")
def sync(n: int) -> None: ...

@app.task("async")
async def asynchronous(n: int) -> None:
    await asyncio.sleep(0)

@app.task("slow")
async def slow() -> None:
    await asyncio.sleep(60)

@app.task("endless")
def endless() -> None:
    while True:
        time.sleep(0.001)

@app.task("timed", timeout=0.1)
def timed() -> None:
    endless()

@app.task("chain")
def chain() -> None:
    sync.enqueue(n=1)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def start(dsn: str, migrated: str, tmp_path: Path) -> Iterator[Start]:
    """Starts ``fastq worker`` in a folder with a module `jobs`; what is left of it is killed."""
    (tmp_path / "mytasks.py").write_text(_TASKS)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    started: list[subprocess.Popen[str]] = []
    env = {**os.environ, "FASTQ_DSN": dsn, "FASTQ_SCHEMA": migrated, "PYTHONUNBUFFERED": "1"}

    def worker(*args: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastq", "worker", *args],
            cwd=tmp_path,
            env=env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield worker
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _consumers(db: psycopg.Connection) -> list[tuple[list[str], list[str] | None]]:
    return db.execute("SELECT types, queues FROM consumer").fetchall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_it_works_until_a_signal(
    start: Start, producer: Producer, db: psycopg.Connection, number: signal.Signals
) -> None:
    producer.enqueue_many([Task("sync", {"n": 1}), Task("async", {"n": 1}), Task("chain", {})])
    process = start("mytasks:app")
    wait_for_states(db, {"completed": 4})
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert "runs async, chain, endless, slow, sync, timed of all queues in schema" in err
    assert "has stopped" in err
    # A line is a time, a level, a name and a message.
    assert all(line[:4].isdigit() and " fastq." in line for line in err.splitlines())
    assert _consumers(db) == []


def test_a_second_signal_ends_it_at_once(start: Start, producer: Producer, db: psycopg.Connection) -> None:
    producer.enqueue(Task("slow", {}))
    process = start("mytasks:app")
    wait_until(lambda: states(db) == {"running": 1})
    process.terminate()
    wait_until(lambda: db.execute("SELECT bool_and(stopping) FROM consumer").fetchone() == (True,))
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "1 handlers did not end in time" in err


def test_threads_that_were_given_up_do_not_abort_it(start: Start, producer: Producer, db: psycopg.Connection) -> None:
    producer.enqueue_many(Task("endless", {}) for _ in range(8))
    process = start("mytasks:app")
    wait_for_states(db, {"running": 8})
    process.terminate()
    wait_until(lambda: db.execute("SELECT bool_and(stopping) FROM consumer").fetchone() == (True,))
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "8 handlers did not end in time" in err
    assert err.count("has stopped") == 1


def test_options(start: Start, producer: Producer, db: psycopg.Connection, dsn: str, migrated: str) -> None:
    # The command line wins over the environment.
    process = start(
        "mytasks:Box.inner", "--queues", "a, b", "--concurrency", "2", "--dsn", dsn, "--schema", migrated,
        FASTQ_DSN="host=nowhere", FASTQ_SCHEMA="nowhere",
    )  # fmt: skip
    producer.enqueue_many(Task("sync", {"n": 1}, queue=queue) for queue in ("a", "b", "c"))
    wait_for_states(db, {"completed": 2, "pending": 1})
    assert [queues for _, queues in _consumers(db)] == [["a", "b"]]
    process.terminate()
    assert process.wait(20) == 0


def _catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether it has a handler for that signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_the_attribute_is_app_unless_it_is_named(start: Start, db: psycopg.Connection) -> None:
    process = start("mytasks")
    wait_until(lambda: _consumers(db))
    wait_until(lambda: _catches(process, signal.SIGTERM), message="its handler of SIGTERM, set once it has started")
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["nothing:app"], 1, "there is no module 'nothing' in"),
        (["mytasks:nothing"], 1, "nothing in module 'mytasks' is not there, but must be a fastq.App"),
        (["mytasks:other"], 1, "other in module 'mytasks' is int, but must be a fastq.App"),
        ([":app"], 2, "names no module"),
        (["mytasks:app", "--concurrency", "0"], 1, "concurrency is 0"),
        (["mytasks:app", "--queues", ""], 1, "a queue has 0 characters"),
        (["mytasks:app", "--schema", "x" * 64], 1, "schema"),
        ([], 2, "Missing argument"),
        # What is wrong with the module itself needs its traceback.
        (["broken:app"], 1, "No module named 'no_such_module'"),
        (["failing:app"], 1, "ZeroDivisionError"),
    ],
)
def test_misuse(start: Start, args: list[str], status: int, message: str) -> None:
    process = start(*args)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert message in err
    assert ("Traceback" in err) == (args in (["broken:app"], ["failing:app"]))


def test_a_schema_that_is_not_migrated(start: Start, db: psycopg.Connection) -> None:
    process = start("mytasks:app", FASTQ_SCHEMA="nowhere")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "fastq migrate" in err
    assert "Traceback" not in err


def test_no_password_is_shown(start: Start) -> None:
    process = start("mytasks:app", FASTQ_DSN="postgresql://me:s3cret@127.0.0.1:1/db?connect_timeout=2")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "s3cret" not in out + err


def test_too_many_handlers_that_nobody_can_end(start: Start, producer: Producer, db: psycopg.Connection) -> None:
    producer.enqueue_many(Task("timed", {}, max_attempts=1) for _ in range(2))
    worker = start("mytasks:app", "--stuck-limit", "1")
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert "Error: the consumer ended by itself: 2 sync handlers go on although their time is up" in said
    assert states(db) == {"failed": 2}
