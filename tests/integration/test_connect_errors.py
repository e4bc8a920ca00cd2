"""What can be wrong about a connection, told by every part of fastq: which part is wrong, in time, and no secret."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import make_conninfo

import fastq
from fastq._db import Database
from fastq.cli import main
from fastq.errors import DatabaseError, FastqError, SettingsError
from tests.support.faults.server import PrivateServer
from tests.support.waiting import wait_until

SECRET: Final = "hunter2-s3cret"  # noqa: S105 it is the test's


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateServer]:
    with PrivateServer() as server:
        fastq.migrate(server.dsn, schema="mine")
        with server.superuser() as db:
            db.execute(psycopg.sql.SQL("CREATE ROLE stranger LOGIN PASSWORD {}").format(SECRET))
            db.execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
        yield server


def by_producer(dsn: str) -> None:
    with fastq.Producer(dsn, schema="mine", connect_timeout=2) as producer:
        producer.enqueue(fastq.Task("t"))


def by_many(dsn: str) -> None:
    with fastq.Producer(dsn, schema="mine", connect_timeout=2) as producer:
        producer.enqueue_many([fastq.Task("t", {})] * 100)


def by_consumer(dsn: str) -> None:
    consumer = fastq.Consumer(dsn, schema="mine", connect_timeout=2)
    consumer.handler("t")(lambda task: None)
    with consumer:
        pass


def by_client(dsn: str) -> None:
    with fastq.Client(dsn, schema="mine", connect_timeout=2) as client:
        client.counts()


def by_migrations(dsn: str) -> None:
    fastq.migrate(dsn, schema="mine", connect_timeout=2)


def by_database(dsn: str) -> None:
    with Database(dsn, "mine", connect_timeout=2) as db:
        db.query("check_schema")


PARTS: Final = [by_producer, by_many, by_consumer, by_client, by_migrations, by_database]


@pytest.fixture
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


#: What is wrong, and what the message says of it. `{port}` is the server's.
WRONG: Final = [
    ("host=127.0.0.1 port={port} user=fastq passwrod=" + SECRET, ["passwrod"]),
    ("postgresql://fastq:" + SECRET + "@127.0.0.1:{port}/fastq?sslmod=require", ["sslmod"]),
    (
        "host=127.0.0.1 port={port} user=fastq password=" + SECRET + " sslmode=verify-full sslrootcert=/no/root.crt",
        ["/no/root.crt"],
    ),
    (
        "host=127.0.0.1 port={port} user=fastq password=" + SECRET + " sslcert=/no/client.crt sslmode=require",
        ["/no/client.crt"],
    ),
    (
        "host=127.0.0.1 port={port} user=fastq dbname=fastq password=" + SECRET,
        ['password authentication failed for user "fastq"'],
    ),
    ("host=127.0.0.1 port={port} user=nobody_here dbname=fastq password=" + SECRET, ['for user "nobody_here"']),
    ("host=127.0.0.1 port={port} user=fastq dbname=fastq", ["no password|there is none"]),
    (
        "host=127.0.0.1 port={port} user=stranger dbname=nowhere password=" + SECRET,
        ['database "nowhere" does not exist'],
    ),
    (
        "host=127.0.0.1 port={port} user=stranger dbname=postgres password=" + SECRET,
        ['permission denied for database "postgres"'],
    ),
    (
        "host=127.0.0.1 port={port} user=stranger dbname=fastq password=" + SECRET,
        ["permission denied.* schema"],
    ),
    ("host=127.0.0.1 port={port} user=fastq sslmode=require password=" + SECRET, ["TLS|SSL"]),
    ("postgresql://fastq:a/" + SECRET + "@127.0.0.1:{port}/fastq", ["port|%40"]),
    ("postgresql://fastq:a@" + SECRET + "@127.0.0.1:{port}/fastq", ["%40"]),
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("dsn", "says"), WRONG, ids=[text.replace(SECRET, "...") for text, _ in WRONG])
def test_says_which_part_is_wrong(
    server: PrivateServer, part: Callable[[str], None], dsn: str, says: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fastq")
    started = time.monotonic()
    with pytest.raises(FastqError) as caught:
        part(dsn.format(port=server.port))
    assert time.monotonic() - started < 10
    error = caught.value
    assert isinstance(error, SettingsError | DatabaseError)
    for each in says:
        assert caught.match(each)
    assert SECRET not in str(error) + repr(error) + repr(error.__cause__) + caplog.text
    if isinstance(error, DatabaseError) and "%40" not in str(error):
        assert not error.is_transient


@pytest.mark.parametrize("part", PARTS)
def test_a_host_that_does_not_answer(part: Callable[[str], None], silent: int) -> None:
    started = time.monotonic()
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1") as caught:
        part(f"host=127.0.0.1 port={silent} user=u password={SECRET}")
    assert caught.value.is_transient
    assert SECRET not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("command", [["doctor"], ["migrate"], ["migrate", "--status"]])
def test_the_command_line_and_a_host_that_does_not_answer(command: list[str], silent: int) -> None:
    dsn = f"host=127.0.0.1 port={silent} user=u password={SECRET}"
    started = time.monotonic()
    told = CliRunner().invoke(main, [*command, "--dsn", dsn, "--connect-timeout", "2"])
    assert time.monotonic() - started < 5
    assert told.exit_code == 1
    assert re.search(r"could not connect to .*127\.0\.0\.1.*time", told.output, re.DOTALL)
    assert SECRET not in told.output


def test_unless_told_otherwise_a_host_is_given_ten_seconds(silent: int) -> None:
    """All parts at once: it takes long enough."""
    dsn = f"host=127.0.0.1 port={silent} user=u password={SECRET}"
    producer, consumer, client = fastq.Producer(dsn), fastq.Consumer(dsn), fastq.Client(dsn)
    consumer.handler("t")(lambda task: None)
    parts: list[Callable[[], object]] = [
        lambda: producer.enqueue(fastq.Task("t")),
        lambda: producer.enqueue_many([fastq.Task("t", {})] * 100),
        consumer.start,
        client.counts,
        lambda: fastq.migrate(dsn),
        lambda: fastq.migrations.status(dsn),
    ]

    def try_it(part: Callable[[], object]) -> tuple[FastqError, float]:
        started = time.monotonic()
        with pytest.raises(FastqError) as caught:
            part()
        return caught.value, time.monotonic() - started

    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(try_it, parts))
    producer.close()
    for error, took in found:
        assert isinstance(error, DatabaseError)
        assert error.is_transient
        assert SECRET not in str(error)
        assert 9 < took < 15


@pytest.mark.parametrize("command", [["doctor"], ["migrate", "--status"], ["enqueue", "t"]])
def test_the_command_line_says_it_too(server: PrivateServer, command: list[str]) -> None:
    dsn = f"host=127.0.0.1 port={server.port} user=fastq dbname=fastq password={SECRET}"
    done = subprocess.run(
        [sys.executable, "-m", "fastq", *command, "--dsn", dsn],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "password authentication failed" in said
    assert SECRET not in said
    assert "Traceback" not in said


def test_a_worker_goes_on_trying_when_its_password_is_changed(server: PrivateServer) -> None:
    """A refused login is final for who starts; for who runs already it is one more thing that may pass."""
    ran: list[int] = []
    with server.superuser() as db:
        db.execute("CREATE ROLE changed LOGIN PASSWORD 'before' IN ROLE fastq")
        dsn = make_conninfo(server.dsn, user="changed", password="before", application_name="changed")
        consumer = fastq.Consumer(dsn, schema="mine", heartbeat_interval=0.2, dead_after=2.0)
        consumer.handler("changed")(lambda task: ran.append(task.id))
        with consumer, fastq.Producer(server.dsn, schema="mine") as producer:
            producer.enqueue(fastq.Task("changed"))
            wait_until(lambda: len(ran) == 1)
            db.execute("ALTER ROLE changed PASSWORD 'after'")
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'changed'"
            db.execute(ended)
            log = server.log_path
            wait_until(lambda: log.read_text().count('authentication failed for user "changed"') >= 4)
            db.execute("ALTER ROLE changed PASSWORD 'before'")
            producer.enqueue(fastq.Task("changed"))
            wait_until(lambda: len(ran) == 2)


def test_a_string_is_checked_before_anything_is_sent() -> None:
    for dsn in ("host=127.0.0.1 port=1 sslmode=verify-full sslrootcert=/no/root.crt", "host=h nonsense=1"):
        with pytest.raises(SettingsError):
            fastq.Producer(dsn)
