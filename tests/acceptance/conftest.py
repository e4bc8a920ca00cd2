"""The stage on which the cases are played: one a module, since nothing of a case outlasts it but its rows."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from fastq.migrations import migrate
from tests.acceptance.stage import ACTORS, Stage


@pytest.fixture(scope="module", params=list(ACTORS))
def stage(dsn: str, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A migrated schema, and who acts on it; once for each kind of client and handler."""
    name = f"test_{secrets.token_hex(6)}"
    migrate(dsn, schema=name)
    found = Stage(dsn, name, request.param)
    try:
        yield found
    finally:
        found.close()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '10s'")
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))
