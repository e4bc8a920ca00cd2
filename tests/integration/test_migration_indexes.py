"""Indexes of tables in use: where they are built, what goes on meanwhile, and what a builder that died leaves behind."""

from __future__ import annotations

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from fastq import Producer, Task, _indexes, migrate
from fastq.cli import main
from fastq.migrations import _steps, status
from tests.support.producing import Background
from tests.support.waiting import wait_until

INDEXES = {index.name: index.table for step in _steps().values() for index in step.indexes}
LATEST = max(_steps())
WAITS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
    "AND query LIKE 'CREATE INDEX CONCURRENTLY%token_id%'"
)


@pytest.fixture
def old(dsn: str, schema: str) -> str:
    """A schema as the version before left it, with a token."""
    migrate(dsn, schema=schema, target=2)
    with psycopg.connect(dsn, autocommit=True) as owner:
        insert = sql.SQL("INSERT INTO {}.token (type, token, id) VALUES ('t', 'a', 1), ('t', 'b', 2)")
        owner.execute(insert.format(sql.Identifier(schema)))
    return schema


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one row counts as large."""
    monkeypatch.setattr(_indexes, "_SMALL", 0)


def _state(db: psycopg.Connection, schema: str) -> dict[str, bool]:
    """Which of the indexes are there, and whether they are whole."""
    rows = db.execute(
        "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE c.relnamespace = %s::regnamespace AND c.relname = ANY (%s)",
        [f'"{schema}"', list(INDEXES)],
    )
    return dict(rows.fetchall())


def _begin_reading(session: psycopg.Connection) -> None:
    """Its snapshot is one that an index built beside others waits for."""
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.execute("SELECT 1")


def test_a_small_table_waits_for_nobodys_transaction(dsn: str, old: str, db: psycopg.Connection) -> None:
    with psycopg.connect(dsn, autocommit=True) as reader:
        _begin_reading(reader)
        call = Background(lambda: migrate(dsn, schema=old))
        assert [step.version for step in call.result()] == [LATEST]
    assert _state(db, old) == dict.fromkeys(INDEXES, True)


@pytest.mark.usefixtures("large")
def test_others_go_on_while_a_large_table_gets_one(dsn: str, old: str, db: psycopg.Connection) -> None:
    with psycopg.connect(dsn, autocommit=True) as reader:
        _begin_reading(reader)
        call = Background(lambda: migrate(dsn, schema=old))
        wait_until(lambda: db.execute(WAITS).fetchone() == (1,), message="the index to wait for the reader")
        assert status(dsn, schema=old).version == LATEST
        with Producer(dsn, schema=old) as producer:
            assert producer.enqueue(Task("t", idempotency_token="new")).is_new
            assert not producer.enqueue(Task("t", idempotency_token="a")).is_new
        assert _state(db, old)["token_id"] is False
        reader.execute("ROLLBACK")
        call.result()
    assert _state(db, old) == dict.fromkeys(INDEXES, True)
    assert migrate(dsn, schema=old) == []


@pytest.mark.usefixtures("large")
def test_what_a_builder_left_behind_is_built_anew(dsn: str, old: str, db: psycopg.Connection) -> None:
    migrate(dsn, schema=old)
    table = sql.Identifier(old, "token")
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(old, "token_id")))
        with pytest.raises(psycopg.errors.UniqueViolation):
            owner.execute(sql.SQL("CREATE UNIQUE INDEX CONCURRENTLY token_id ON {} ((1))").format(table))
    assert _state(db, old)["token_id"] is False
    said = CliRunner().invoke(main, ["doctor", "--dsn", dsn, "--schema", old]).output
    assert f"warning  schema: {old!r} lacks indexes that its steps bring: token_id" in said
    assert migrate(dsn, schema=old) == []
    assert _state(db, old) == dict.fromkeys(INDEXES, True)
    with Producer(dsn, schema=old) as producer:
        assert producer.enqueue(Task("t", idempotency_token="new")).is_new, "it is no longer unique"


@pytest.mark.usefixtures("large")
def test_several_build_them_at_once(dsn: str, old: str, db: psycopg.Connection) -> None:
    """All wait for the table; then one builds, and the others find it there."""
    migrate(dsn, schema=old)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(old, "token_id")))
    with psycopg.connect(dsn, autocommit=True) as locker:
        locker.execute("BEGIN")
        locker.execute(sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(sql.Identifier(old, "token")))
        one, two = (Background(lambda: migrate(dsn, schema=old)) for _ in range(2))
        wait_until(lambda: db.execute(WAITS).fetchone() == (2,), message="both to wait for the table")
        locker.execute("ROLLBACK")
        one.result()
        two.result()
    assert _state(db, old) == dict.fromkeys(INDEXES, True)
