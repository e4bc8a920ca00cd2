"""Fixtures for all tests: one server a session, one schema a test."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import hypothesis
import psycopg
import pytest
from psycopg import sql

from tests.support.databases import Database, any_database

# An example takes as long as the machine lets it: tests beside it, or other users, may have it for seconds.
hypothesis.settings.register_profile("fastq", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("fastq")


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    """The session's database; its `admin_dsn` is None where it was given by ``FASTQ_TEST_DSN``."""
    with any_database() as found:
        yield found


@pytest.fixture(scope="session")
def dsn(database: Database) -> str:
    """The connection string of a role that is no superuser and may create schemas."""
    return database.dsn


@pytest.fixture
def schema(dsn: str) -> Iterator[str]:
    """The name of a schema for this test alone. It is not there yet, and gone afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    yield name
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET lock_timeout = '10s'")  # what a test left open shows as an error here, not as a hang
        connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))


@pytest.fixture
def migrated(dsn: str, schema: str) -> str:
    """The name of this test's schema, migrated."""
    from fastq.migrations import migrate  # noqa: PLC0415 tests without a database need no engine either

    migrate(dsn, schema=schema)
    return schema


@pytest.fixture
def db(dsn: str, schema: str) -> Iterator[psycopg.Connection]:
    """A connection that commits each statement, and looks names up in this test's schema first."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_catalog.set_config('search_path', %s, false)", [schema])
        connection.execute("SET jit = off")  # the view `tasks` has so many parts that compiling them takes seconds
        yield connection
