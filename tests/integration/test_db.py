"""The door to psycopg against a server: transactions, errors with their codes, and nothing that a pooler would not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from fastq._db import Database
from fastq.errors import ConnectionLost, DatabaseError
from tests.support.storage import Session
from tests.support.waiting import wait_until


@pytest.fixture
def connected(dsn: str, migrated: str) -> Iterator[Database]:
    with Database(dsn, migrated) as database:
        yield database


def end(store: Session, database: Database) -> None:
    """The server ends this connection."""
    [(pid,)] = database.run("SELECT pg_backend_pid()")
    store.sql("SELECT pg_terminate_backend($1::integer)", pid)
    wait_until(lambda: store.sql("SELECT FROM pg_stat_activity WHERE pid = $1", pid) == [])


def test_an_error_carries_the_servers_code(connected: Database) -> None:
    with pytest.raises(DatabaseError, match="does not exist") as caught:
        connected.run("SELECT * FROM fastq.nowhere")
    assert (caught.value.sqlstate, caught.value.is_transient) == ("42P01", False)
    assert isinstance(caught.value.__cause__, psycopg.Error)
    # The connection is as good as before.
    assert connected.run("SELECT 1") == [(1,)]


def add_lane_and(database: Database, then: Callable[[], object]) -> None:
    """A transaction that writes, and in which something happens before its commit."""
    with database.transaction():
        database.query("create_lane", "q", "t", 0)
        then()


def test_a_transaction_is_undone_by_an_error(connected: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        add_lane_and(connected, lambda: 1 // 0)
    assert connected.query("find_lane", "q", "t", 0) == []


def test_a_number_is_of_one_type_whatever_its_size(connected: Database) -> None:
    for number in (1, 2**15, 2**31, 2**62):
        assert connected.run("SELECT pg_typeof($1)::text, pg_typeof($2)::text", number, [number]) == [
            ("bigint", "bigint[]")
        ]


@pytest.mark.parametrize("default", ["serializable", "repeatable read", "read uncommitted"])
def test_transactions_are_read_committed_whatever_the_roles_default_is(dsn: str, migrated: str, default: str) -> None:
    options = "-c default_transaction_isolation=" + default.replace(" ", "\\ ")
    with Database(psycopg.conninfo.make_conninfo(dsn, options=options), migrated) as database:
        assert database.run("SHOW default_transaction_isolation") == [(default,)]
        with database.transaction():
            assert database.run("SHOW transaction_isolation") == [("read committed",)]


def test_nothing_is_left_in_the_session(connected: Database) -> None:
    """A pooler gives each transaction another session: no named statements, no settings that outlive a transaction."""
    for _ in range(10):
        with connected.transaction():
            connected.query("set_plan", "off")
            connected.query("set_lock_timeout", "50ms")
            connected.query("find_lane", "q", "t", 0)
    assert connected.run("SELECT name FROM pg_prepared_statements") == []
    settings = (
        "SELECT name FROM pg_settings WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding')"
    )
    assert connected.run(settings) == []


def test_a_connection_that_the_server_ended(connected: Database, open_session: Callable[[], Session]) -> None:
    end(open_session(), connected)
    with pytest.raises(ConnectionLost) as caught:
        connected.run("SELECT 1")
    assert caught.value.is_transient
    assert not caught.value.in_doubt
    assert connected.is_closed
    with pytest.raises(ConnectionLost):
        connected.run("SELECT 1")


def test_a_commit_whose_answer_never_came_is_in_doubt(connected: Database, store: Session) -> None:
    with pytest.raises(ConnectionLost) as caught:
        add_lane_and(connected, lambda: end(store, connected))
    assert caught.value.in_doubt


def test_a_loss_before_the_commit_is_in_no_doubt(connected: Database, store: Session) -> None:
    def end_and_go_on() -> None:
        end(store, connected)
        connected.run("SELECT 1")

    with pytest.raises(ConnectionLost) as caught:
        add_lane_and(connected, end_and_go_on)
    assert not caught.value.in_doubt
