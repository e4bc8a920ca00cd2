"""Migrations: up, down, many at once, versions that don't match, rights that are missing."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql

import fastq.migrations as migrations_module
from fastq import _engine
from fastq._db import Database
from fastq.client import Client
from fastq.errors import DatabaseError, SchemaError, SettingsError
from fastq.migrations import check, down, migrate, preview_down, status
from tests.support.storage import Session, enqueue
from tests.support.waiting import wait_until

LATEST = max(version for version, *_ in _engine.migrations())


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """This fastq knows one step more than there is: an extra table."""
    steps = dict(migrations_module._steps())
    extra = replace(
        steps[LATEST],
        version=LATEST + 1,
        name="extra",
        up="CREATE TABLE fastq.extra (n integer); INSERT INTO fastq.extra VALUES (1), (2);",
        down="DROP TABLE fastq.extra;",
        oldest="0.1.0",
        indexes=(),
    )
    monkeypatch.setattr(migrations_module, "_steps", lambda: steps | {extra.version: extra})


def tables(db: psycopg.Connection, schema: str) -> set[str]:
    """What a schema holds: tables, sequences, views, indexes."""
    rows = db.execute(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s", [schema]
    )
    return {name for (name,) in rows}


def test_migrate_creates_the_schema_and_says_what_it_did(dsn: str, schema: str) -> None:
    applied = migrate(dsn, schema=schema)
    assert [migration.version for migration in applied] == list(range(1, LATEST + 1))
    assert all(migration.applied_at and migration.applied_at.utcoffset() is not None for migration in applied)
    assert migrate(dsn, schema=schema) == []
    found = status(dsn, schema=schema)
    assert (found.schema, found.version, found.latest, found.migrations) == (schema, LATEST, LATEST, applied)


def test_migrate_takes_dsn_and_schema_from_the_environment(
    dsn: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTQ_DSN", dsn)
    monkeypatch.setenv("FASTQ_SCHEMA", schema)
    assert len(migrate()) == LATEST
    assert status().version == LATEST


def test_without_a_dsn_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    with pytest.raises(SettingsError, match="FASTQ_DSN"):
        migrate()


def test_status_of_a_database_that_was_never_migrated(dsn: str, schema: str) -> None:
    found = status(dsn, schema=schema)
    assert found.version == 0
    assert [migration.applied_at for migration in found.migrations] == [None] * LATEST


def columns(db: psycopg.Connection, schema: str) -> set[tuple[str, str, str]]:
    """The columns of a schema's tables and views, with their types."""
    rows = db.execute(
        "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND a.attnum > 0 AND NOT a.attisdropped",
        [schema],
    )
    return set(rows)


def test_each_step_is_undone_to_what_was_before_it(dsn: str, schema: str, db: psycopg.Connection) -> None:
    found = {}
    for version in range(1, LATEST + 1):
        migrate(dsn, schema=schema, target=version)
        found[version] = columns(db, schema)
    for version in range(LATEST - 1, 0, -1):
        assert found[version] != found[version + 1]
        down(dsn, schema=schema, target=version, yes=True)
        assert columns(db, schema) == found[version]
    migrate(dsn, schema=schema)
    assert columns(db, schema) == found[LATEST]


def test_workers_of_the_first_release_go_on_after_step_2(
    dsn: str, schema: str, open_session: Callable[[], Session]
) -> None:
    """What 0.1.0 says at its start and at each heartbeat is still understood; the table has columns that it does not name."""
    session = open_session()
    session.run("register_consumer", 7, 1, "host", "0.1.0", ["t"], None)
    beat = (
        "UPDATE fastq.consumer SET beat_at = clock_timestamp(), running = $2::int8multirange, stopping = $3::boolean "
        "WHERE id = $1::bigint AND dead_at IS NULL RETURNING id, refused, refused_at"
    )
    assert session.sql(beat, 7, "{}", False) == [(7, 0, None)]


def test_up_down_up_leaves_nothing_behind(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    before = tables(db, migrated)
    undone = down(dsn, schema=migrated, target=0, yes=True)
    assert [migration.version for migration in undone] == list(range(LATEST, 0, -1))
    assert tables(db, migrated) == set()
    # What an administrator made, with its grants, stays.
    assert db.execute("SELECT FROM pg_namespace WHERE nspname = %s", [migrated]).fetchall() == [()]
    assert status(dsn, schema=migrated).version == 0
    migrate(dsn, schema=migrated)
    assert tables(db, migrated) == before


@pytest.mark.usefixtures("two_steps")
def test_down_undoes_the_last_step_alone_unless_told_otherwise(dsn: str, schema: str, db: psycopg.Connection) -> None:
    migrate(dsn, schema=schema)
    assert "extra" in tables(db, schema)
    assert preview_down(dsn, schema=schema).tables == [("extra", 2)]
    assert [migration.name for migration in down(dsn, schema=schema, yes=True)] == ["extra"]
    assert "extra" not in tables(db, schema)
    assert status(dsn, schema=schema).version == LATEST


@pytest.mark.usefixtures("two_steps")
def test_migrate_stops_at_its_target(dsn: str, schema: str) -> None:
    assert [migration.version for migration in migrate(dsn, schema=schema, target=1)] == [1]
    assert status(dsn, schema=schema).version == 1
    with pytest.raises(SettingsError, match="target is 99"):
        migrate(dsn, schema=schema, target=99)


def test_down_says_what_it_would_delete_and_wants_a_yes(
    dsn: str, migrated: str, open_session: Callable[[], Session]
) -> None:
    enqueue(open_session(), 7, chunk=3)
    loss = preview_down(dsn, schema=migrated, target=0)
    assert [migration.version for migration in loss.migrations] == list(range(LATEST, 0, -1))
    assert {("task", 7), ("ready", 3), ("done", 0)} <= set(loss.tables)
    with pytest.raises(SettingsError, match=r"task \(7 rows\).*yes=True"):
        down(dsn, schema=migrated, target=0)
    assert status(dsn, schema=migrated).version == LATEST


def test_the_preview_names_every_table_that_goes(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    """Partitions are counted as part of their parent."""
    rows = db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition",
        [migrated],
    )
    named = {name for name, _ in preview_down(dsn, schema=migrated, target=0).tables}
    assert named == {name for (name,) in rows} - {"migration"}


def test_down_refuses_targets_that_were_never_applied(dsn: str, migrated: str) -> None:
    with pytest.raises(SettingsError, match="target is 7"):
        down(dsn, schema=migrated, target=7, yes=True)


def test_down_of_what_is_not_migrated(dsn: str, schema: str) -> None:
    with pytest.raises(SchemaError, match="not migrated"):
        down(dsn, schema=schema, yes=True)


# --- many at once, and while tables are busy -----------------------------------------------------


def test_eight_processes_migrate_at_once(dsn: str, schema: str) -> None:
    program = (
        "import sys; from fastq.migrations import migrate; sys.stdin.readline(); "
        "print(len(migrate(sys.argv[1], schema=sys.argv[2])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, dsn, schema], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    # All have started and wait for the word.
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert sum(int(answer) for answer in answers) == LATEST
    assert status(dsn, schema=schema).version == LATEST


def test_a_step_that_fails_leaves_nothing(
    dsn: str, schema: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = migrations_module._steps()[1]
    broken = replace(step, up=step.up + "\nSELECT 1 / 0;")
    monkeypatch.setattr(migrations_module, "_steps", lambda: {1: broken})
    with pytest.raises(DatabaseError, match="division by zero") as caught:
        migrate(dsn, schema=schema)
    assert caught.value.sqlstate == "22012"
    assert tables(db, schema) == set()
    assert db.execute("SELECT FROM pg_namespace WHERE nspname = %s", [schema]).fetchall() == []


def test_a_step_waits_for_a_busy_table_with_a_limit_and_tries_again(
    dsn: str, migrated: str, open_session: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for its lock all others wait behind it, so it steps aside and comes back."""
    monkeypatch.setattr(migrations_module, "_LOCK_TIMEOUT", "50ms")
    busy, observer = open_session(), open_session()
    busy.begin()
    busy.sql("SELECT FROM fastq.ready")
    undone: list[object] = []
    thread = threading.Thread(target=lambda: undone.extend(down(dsn, schema=migrated, target=0, yes=True)))
    thread.start()
    try:
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IN ('fastq.tasks'::regclass, 'fastq.ready'::regclass)"
        for _ in range(2):
            wait_until(lambda: observer.value(waits) > 0)
            wait_until(lambda: observer.value(waits) == 0)
    finally:
        busy.rollback()
        thread.join(60)
    assert len(undone) == LATEST


def test_a_step_gives_up_on_a_table_that_stays_busy(
    dsn: str, migrated: str, open_session: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations_module, "_LOCK_TIMEOUT", "20ms")
    monkeypatch.setattr(migrations_module, "_PATIENCE", 0.2)
    busy = open_session()
    busy.begin()
    busy.sql("SELECT FROM fastq.leaf")
    with pytest.raises(DatabaseError) as caught:
        down(dsn, schema=migrated, target=0, yes=True)
    assert (caught.value.sqlstate, caught.value.is_transient) == ("55P03", True)
    busy.rollback()
    assert status(dsn, schema=migrated).version == 1, "the later steps do without that table"


# --- versions that don't match -------------------------------------------------------------------


@pytest.fixture
def connected(dsn: str, schema: str) -> Iterator[Database]:
    with Database(dsn, schema) as database:
        yield database


def test_check_of_what_is_not_migrated(connected: Database) -> None:
    with pytest.raises(SchemaError, match="is not migrated: run `fastq migrate`"):
        check(connected)


def test_check_of_what_is_migrated(connected: Database, migrated: str) -> None:
    assert connected.schema == migrated
    check(connected)


@pytest.mark.usefixtures("two_steps")
def test_check_of_what_is_too_old(connected: Database, dsn: str, schema: str) -> None:
    migrate(dsn, schema=schema, target=LATEST)
    with pytest.raises(SchemaError, match=f"at step {LATEST}, too old .* needs step {LATEST + 1}"):
        check(connected)


def add_step(db: psycopg.Connection, oldest: str) -> None:
    """A newer fastq migrated."""
    db.execute("INSERT INTO migration (version, name, oldest) VALUES (%s, 'future', %s)", [LATEST + 1, oldest])


def test_a_newer_schema_that_is_open_to_this_fastq_is_accepted(
    connected: Database, db: psycopg.Connection, dsn: str, migrated: str
) -> None:
    """A rolling upgrade: workers of this version go on, and a restart of one does not undo or repeat anything."""
    add_step(db, "0.1.0")
    check(connected)
    assert migrate(dsn, schema=migrated) == []
    assert status(dsn, schema=migrated).version == LATEST + 1
    with Client(dsn, schema=migrated) as client:
        assert client.counts()["pending"] == 0


def test_a_newer_schema_that_is_shut_to_this_fastq_is_refused(
    connected: Database, db: psycopg.Connection, dsn: str, migrated: str
) -> None:
    add_step(db, "99.0.0")
    refused = "shuts out fastq .* needs 99.0.0 or newer"
    with pytest.raises(SchemaError, match=refused):
        check(connected)
    with pytest.raises(SchemaError, match=refused):
        migrate(dsn, schema=migrated)
    with pytest.raises(SchemaError, match=refused):
        Client(dsn, schema=migrated).counts()


def test_down_refuses_a_step_that_it_does_not_know(db: psycopg.Connection, dsn: str, migrated: str) -> None:
    add_step(db, "0.1.0")
    with pytest.raises(SchemaError, match="does not know how to undo"):
        down(dsn, schema=migrated, yes=True)


# --- schemas -------------------------------------------------------------------------------------


def test_two_schemas_of_one_database_are_independent(dsn: str, schema: str, db: psycopg.Connection) -> None:
    other = f"test_{secrets.token_hex(6)}"
    try:
        migrate(dsn, schema=schema)
        migrate(dsn, schema=other)
        first, second = Session(dsn, schema), Session(dsn, other)
        ids = enqueue(first, 3)
        assert enqueue(second, 2)[0] == ids[0], "each has numbers of its own"
        down(dsn, schema=schema, target=0, yes=True)
        assert (
            second.value("SELECT count(*) FROM fastq.tasks") == 0
        )  # its lane is not there: nothing but tables is shared
        assert second.value("SELECT count(*) FROM fastq.task") == 2
        first.close()
        second.close()
    finally:
        db.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(other)))


@pytest.mark.parametrize("name", ["", "pg_mine", "x" * 64, "a\0b"])
def test_names_that_postgresql_would_refuse_or_cut_are_refused(dsn: str, name: str) -> None:
    for call in (migrate, status):
        with pytest.raises(SettingsError, match="schema"):
            call(dsn, schema=name)


def test_a_name_that_has_to_be_quoted(dsn: str, db: psycopg.Connection) -> None:
    name = f"Tasks of {secrets.token_hex(4)} - select"
    try:
        migrate(dsn, schema=name)
        session = Session(dsn, name)
        enqueue(session, 1)
        assert session.value("SELECT count(*) FROM fastq.ready") == 1
        session.close()
        down(dsn, schema=name, target=0, yes=True)
    finally:
        db.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))


# --- rights --------------------------------------------------------------------------------------


def test_a_schema_made_by_an_administrator_is_enough(
    dsn: str, schema: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role without CREATE on the database works where its schema is there."""
    db.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))

    def refuse(_: Database) -> None:
        raise AssertionError("CREATE SCHEMA asks for a right on the database, even with IF NOT EXISTS")

    monkeypatch.setattr(Database, "create_schema", refuse)
    assert len(migrate(dsn, schema=schema)) == LATEST


def test_where_nothing_is_missing_no_right_to_create_is_needed(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    name = sql.Identifier(migrated)
    db.execute(sql.SQL("REVOKE CREATE ON SCHEMA {} FROM CURRENT_USER").format(name))
    try:
        assert migrate(dsn, schema=migrated) == []
        db.execute("DELETE FROM migration")
        with pytest.raises(DatabaseError) as caught:
            migrate(dsn, schema=migrated)
        assert caught.value.sqlstate == "42501"
    finally:
        db.execute(sql.SQL("GRANT CREATE ON SCHEMA {} TO CURRENT_USER").format(name))


def test_no_lock_outlives_its_transaction(connected: Database) -> None:
    """A pooler would hand a session's lock on to somebody else."""
    assert migrations_module._apply(connected, migrations_module._steps()[1]) is not None
    left = connected.run("SELECT locktype FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'")
    assert left == []
