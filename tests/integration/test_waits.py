"""How long the cold path waits for an answer, and every part for a host's name: as long as it was told to."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

import fastq
from fastq import migrations
from fastq._db import Database
from fastq.cli import main
from fastq.errors import ConnectionLost, DatabaseError, SettingsError
from tests.support.faults.network import Proxy
from tests.support.faults.resolver import LOOK_UP_SECONDS, run_without_names
from tests.support.waiting import wait_until

#: Seconds: those calls that are to succeed have no more.
LIMIT: Final = 2.0


@contextmanager
def given_up(dsn: str, *, seconds: float = LIMIT) -> Iterator[None]:
    """What runs inside gets no answer, and says so in time and in the engine's words."""
    words = conninfo_to_dict(dsn)
    started = time.monotonic()
    says = rf"^no answer from {words['host']}:{words['port']}/{words['dbname']} within {seconds:g} s$"
    with pytest.raises(ConnectionLost, match=says) as caught:
        yield
    assert caught.value.is_transient
    assert seconds <= time.monotonic() - started < seconds + 5


@pytest.fixture
def proxy(dsn: str, migrated: str) -> Iterator[Proxy]:
    with Proxy(dsn) as proxy:
        yield proxy


@pytest.fixture
def locked(db: psycopg.Connection, migrated: str) -> Iterator[None]:
    """The table that every part looks at first is locked: to who waits for it, a server that is stuck looks the same."""
    with db.transaction():
        db.execute(sql.SQL("LOCK {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(migrated, "migration")))
        yield


@pytest.mark.parametrize("fault", [Proxy.swallow, Proxy.hold, Proxy.hold_answers])
def test_a_client_gives_up_and_goes_on_with_the_next_call(
    proxy: Proxy, migrated: str, fault: Callable[[Proxy], None]
) -> None:
    with fastq.Client(proxy.dsn, schema=migrated, statement_timeout=LIMIT) as client:
        assert client.counts()["pending"] == 0
        fault(proxy)
        made = proxy.connections
        with given_up(proxy.dsn):
            client.counts()
        # A statement that takes too long would take as long once more.
        assert proxy.connections == made
        proxy.flow()
        assert client.counts()["pending"] == 0


def test_threads_that_wait_for_their_turn_are_given_up_too(proxy: Proxy, migrated: str) -> None:
    """Each has its own time once it is its turn."""
    ends: list[float] = []

    def ask(client: fastq.Client) -> None:
        with pytest.raises(DatabaseError):
            client.counts()
        ends.append(time.monotonic())

    with fastq.Client(proxy.dsn, schema=migrated, statement_timeout=LIMIT, connect_timeout=2) as client:
        client.counts()
        proxy.swallow()
        started = time.monotonic()
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(ends) == 2
    assert max(ends) - started < LIMIT + 2 + 5


def test_a_server_that_is_stuck(dsn: str, migrated: str, locked: None) -> None:
    for part in (migrations.status, fastq.migrate, migrations.preview_down):
        with given_up(dsn):
            part(dsn, schema=migrated, statement_timeout=LIMIT)
    with given_up(dsn), fastq.Client(dsn, schema=migrated, statement_timeout=LIMIT) as client:
        client.counts()


def test_commands_and_a_server_that_is_stuck(dsn: str, migrated: str, locked: None) -> None:
    words = ["--dsn", dsn, "--schema", migrated, "--statement-timeout", str(LIMIT)]
    told = CliRunner().invoke(main, ["doctor", "--json", *words])
    assert told.exit_code == 1
    last = json.loads(told.stdout)["checks"][-1]
    assert (last["name"], last["status"]) == ("connection", "problem")
    assert "no answer from " in last["message"]
    told = CliRunner().invoke(main, ["migrate", "--status", *words])
    assert told.exit_code == 1
    assert "no answer from " in told.stderr


def test_a_migration_waits_without_a_limit_unless_it_is_given_one(
    dsn: str, migrated: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may rightly take long; the default limit of all others, made short, does not hold for it."""
    monkeypatch.setattr(Database.__init__, "__kwdefaults__", {"connect_timeout": 10.0, "statement_timeout": LIMIT})
    found: list[object] = []
    waits = (
        "SELECT FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass "
        "AND clock_timestamp() - waitstart > $2::text::interval"
    )
    with db.transaction():
        db.execute(sql.SQL("LOCK {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(migrated, "migration")))
        thread = threading.Thread(target=lambda: found.append(fastq.migrate(dsn, schema=migrated)))
        thread.start()
        with psycopg.RawCursor(db) as look:
            arguments = [f"{migrated}.migration", f"{LIMIT * 2} s"]
            wait_until(lambda: look.execute(waits, arguments).fetchone() is not None or not thread.is_alive())
    thread.join(20)
    assert found == [[]]


def test_a_commit_whose_answer_does_not_come_is_in_doubt(proxy: Proxy, migrated: str) -> None:
    def add_lane(db: Database) -> None:
        with db.transaction():
            db.query("create_lane", "q", "t", 0)
            proxy.hold_answers()

    with Database(proxy.dsn, migrated, statement_timeout=LIMIT) as db:
        with pytest.raises(ConnectionLost) as caught:
            add_lane(db)
        assert caught.value.in_doubt
        assert db.is_closed


@pytest.mark.parametrize("name", ["connect_timeout", "statement_timeout"])
@pytest.mark.parametrize("value", [0, -1, "1", True, float("nan")])
def test_a_limit_that_is_none_is_refused(name: str, value: object) -> None:
    options = {name: value}
    for part in (fastq.Client, fastq.migrate, migrations.status):
        with pytest.raises(SettingsError, match=name):
            part("host=127.0.0.1 port=1", **options)  # type: ignore[arg-type]


# --- names ---------------------------------------------------------------------------------------

#: Each part tries to connect within a second; how long it took, and how long its end took.
_BY_ALL: Final = """
import json, sys, time
import fastq
dsn, told = "host=db.example.com user=u password=hunter2", []

def run(name, part, end=lambda: None):
    started = time.monotonic()
    try:
        part()
        said = ""
    except fastq.FastqError as error:
        said = f"{type(error).__name__}: {error}"
    failed = time.monotonic()
    end()
    told.append((name, said, failed - started, time.monotonic() - failed))

producer = fastq.Producer(dsn, connect_timeout=1)
run("producer", lambda: producer.enqueue(fastq.Task("t")), producer.close)
consumer = fastq.Consumer(dsn, connect_timeout=1)
consumer.handler("t")(lambda task: None)
run("consumer", consumer.start)
client = fastq.Client(dsn, connect_timeout=1)
run("client", client.counts, client.close)
run("migrate", lambda: fastq.migrate(dsn, connect_timeout=1))
print(json.dumps(told))
"""


def test_a_resolver_that_does_not_answer() -> None:
    """The system goes on looking up for long; nobody waits for it, not even to close."""
    try:
        ran = run_without_names(sys.executable, "-c", _BY_ALL, timeout=LOOK_UP_SECONDS * 5)
    except OSError as error:
        pytest.skip(str(error))
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert [name for name, *_ in told] == ["producer", "consumer", "client", "migrate"]
    for name, said, failed_after, ended_after in told:
        assert "DatabaseError" in said or "ConnectionLost" in said, (name, said)
        assert re.search(r"the host's name was not resolved within (1 s|0\.99\d? s|9\d\d ms)", said), (name, said)
        assert "hunter2" not in said
        assert failed_after < LOOK_UP_SECONDS / 2, name
        assert ended_after < LOOK_UP_SECONDS / 2, name


def test_the_default_limit_holds_for_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the time for connecting is all that a look-up gets; several names share it."""
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60) and [])
    try:
        started = time.monotonic()
        with pytest.raises(DatabaseError, match=r"the names of a,b were not resolved within 0\.5 s") as caught:
            Database("host=a,b user=u", "mine", connect_timeout=0.5)
        assert caught.value.is_transient
        assert time.monotonic() - started < 5
    finally:
        answered.set()


def test_a_name_that_is_none() -> None:
    with pytest.raises(DatabaseError, match="the host's name can't be resolved"):
        Database(f"host={'a' * 64}.example.com user=u", "mine")
