"""The door to psycopg: what its errors become, and that no password leaves with them."""

from __future__ import annotations

import traceback

import psycopg
import pytest

from fastq._db import Database, _translate
from fastq.errors import ConnectionLost, DatabaseError, FastqError, SettingsError

# Nobody listens there.
CLOSED = "127.0.0.1:1"
SECRET = "hunter2-s3cret"  # noqa: S105 it is the test's


def refusal(dsn: str) -> FastqError:
    """The error of a connection that can't be made."""
    with pytest.raises(FastqError) as caught:
        Database(dsn, "fastq")
    return caught.value


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://user:{SECRET}@{CLOSED}/db",
        f"postgres://user:{SECRET}@{CLOSED}",
        f"host=127.0.0.1 port=1 user=u password={SECRET}",
        f"host=127.0.0.1 port=1 password='{SECRET} {SECRET}'",
        # Misread: the password is cut where it holds one of these, and libpq takes the rest for something else.
        f"postgresql://user:a@{SECRET}@{CLOSED}/db",
        f"postgresql://user:a/{SECRET}@{CLOSED}/db",
        f"postgresql://user:{SECRET}/a@{CLOSED}/db",
        f"postgresql://user:a?{SECRET}@{CLOSED}/db",
        f"postgresql://user:{SECRET}?a@{CLOSED}/db",
        f"postgresql://user:a#{SECRET}@{CLOSED}/db",
        f"postgresql://user:%zz{SECRET}@{CLOSED}/db",
        f"postgresql://user:{SECRET}%@{CLOSED}/db",
        # Not a connection string at all.
        SECRET,
        f"user {SECRET}",
        f"passwrod={SECRET}",
        f"host=127.0.0.1 port=1 password={SECRET} {SECRET}",
        f"mysql://user:{SECRET}@{CLOSED}/db",
    ],
)
def test_a_password_stands_in_no_error(dsn: str) -> None:
    error = refusal(dsn)
    assert isinstance(error, SettingsError | DatabaseError)
    shown = "".join(traceback.format_exception(error))
    # (The test's own line is not in it: the dsn is a parameter.)
    assert SECRET not in shown
    assert SECRET not in repr(error)


def test_an_unreachable_server_is_worth_another_try() -> None:
    error = refusal(f"postgresql://user@{CLOSED}/db")
    assert isinstance(error, DatabaseError)
    assert error.is_transient
    assert str(error).startswith("could not connect to database 'db' at 127.0.0.1: ")
    assert "refused" in str(error)


def test_a_dsn_that_cannot_be_read_says_what_one_looks_like() -> None:
    error = refusal("no such thing")
    assert isinstance(error, SettingsError)
    assert "postgresql://user@host/database" in str(error)


@pytest.mark.parametrize("schema", ["", "pg_x", "x" * 64])
def test_a_schema_is_refused_before_anything_is_sent(schema: str) -> None:
    with pytest.raises(SettingsError, match="schema"):
        Database(f"postgresql://user@{CLOSED}/db", schema)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (psycopg.errors.DeadlockDetected("d"), True),
        (psycopg.errors.SerializationFailure("s"), True),
        (psycopg.errors.LockNotAvailable("l"), True),
        (psycopg.errors.TooManyConnections("t"), True),
        (psycopg.errors.DiskFull("f"), True),
        (psycopg.errors.UndefinedTable("u"), False),
        (psycopg.errors.UniqueViolation("u"), False),
        (psycopg.errors.QueryCanceled("q"), False),
        (psycopg.ProgrammingError("no code"), False),
    ],
)
def test_which_errors_are_worth_another_try(error: psycopg.Error, *, transient: bool) -> None:
    translated = _translate(error, lost=False)
    assert (translated.sqlstate, translated.is_transient) == (error.sqlstate, transient)
    assert not isinstance(translated, ConnectionLost)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (psycopg.OperationalError("the connection is closed"), True),
        (psycopg.InterfaceError("the connection is closed"), False),
        (psycopg.errors.AdminShutdown("a"), False),
        (psycopg.errors.CrashShutdown("c"), False),
        (psycopg.errors.CannotConnectNow("c"), False),
    ],
)
def test_which_errors_mean_that_the_connection_is_lost(error: psycopg.Error, *, lost: bool) -> None:
    translated = _translate(error, lost=lost)
    assert isinstance(translated, ConnectionLost)
    assert translated.is_transient
    assert not translated.in_doubt
