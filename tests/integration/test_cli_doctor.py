"""``fastq doctor``: what is wrong with a database."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from fastq import Producer, Task
from fastq.cli import main
from fastq.cli.doctor import doctor
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.databases import Database

Run = Callable[..., Result]


@pytest.fixture
def run(dsn: str, schema: str) -> Run:
    """Runs ``fastq doctor`` on this test's schema."""

    def ask(*args: str, dsn: str = dsn) -> Result:
        return CliRunner().invoke(main, ["doctor", "--dsn", dsn, "--schema", schema, *args])

    return ask


def _checks(result: Result) -> dict[str, tuple[str, str]]:
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    return {check["name"]: (check["status"], check["message"]) for check in answer["checks"]}


def test_a_database_in_order(run: Run, migrated: str) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for name in (
        "connection",
        "server",
        "fsync",
        "full_page_writes",
        "synchronous_commit",
        "schema",
        "rights",
        "waiting",
    ):
        assert f"ok       {name}: " in result.stdout
    assert "problem" not in result.stdout
    checks = _checks(run("--json"))
    assert {status for status, _ in checks.values()} == {"ok"}
    assert checks["consumers"] == ("ok", "none alive")


def test_a_schema_that_is_not_migrated(run: Run) -> None:
    result = run("--json")
    assert result.exit_code == 1
    status, message = _checks(result)["schema"]
    assert status == "problem"
    assert "fastq migrate" in message


def test_types_that_wait_with_no_live_consumer(run: Run, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with Producer(dsn, schema=migrated) as producer:
        producer.enqueue_many([Task("a"), Task("a"), Task("b", queue="q"), Task("later", delay=3600)])
    result = run("--json")
    assert result.exit_code == 1
    assert _checks(result)["waiting"] == (
        "problem",
        "no live consumer takes 'a' in queue 'default' (2 tasks); 'b' in queue 'q' (1 tasks)",
    )
    consumer = new_consumer(dsn, migrated, queues=["default"])
    consumer.handler("b")(lambda _: None)
    with consumer:
        # It lives, but takes neither the type nor the queue.
        assert "'a' in queue 'default'" in _checks(run("--json"))["waiting"][1]
        assert "'b' in queue 'q'" in _checks(run("--json"))["waiting"][1]
        assert _checks(run("--json"))["consumers"][1].startswith("1 alive: process ")
    # One that was silent for long is not alive.
    db.execute(
        "INSERT INTO consumer (id, pid, host, version, types, beat_at) "
        "VALUES (1, 1, 'h', '1', '{a,b}', clock_timestamp() - interval '1 minute')"
    )
    assert "'a' in queue" in _checks(run("--json"))["waiting"][1]
    db.execute("UPDATE consumer SET beat_at = clock_timestamp()")
    assert run().exit_code == 0


@pytest.mark.parametrize("setting", ["synchronous_commit"])
def test_settings_that_cost_durability(run: Run, dsn: str, migrated: str, setting: str) -> None:
    result = run("--json", dsn=make_conninfo(dsn, options=f"-c {setting}=off"))
    assert result.exit_code == 1
    status, message = _checks(result)[setting]
    assert (status, message.partition(":")[0]) == ("problem", "off")


def test_a_read_only_role(run: Run, dsn: str, migrated: str) -> None:
    result = run("--json", dsn=make_conninfo(dsn, options="-c default_transaction_read_only=on"))
    assert result.exit_code == 1
    assert "default_transaction_read_only" in _checks(result)["server"][1]


def test_no_connection_and_no_password(run: Run) -> None:
    result = run("--json", dsn="postgresql://me:s3cret@127.0.0.1:1/db")
    assert result.exit_code == 1
    assert _checks(result)["connection"][0] == "problem"
    assert "s3cret" not in result.output
    assert "s3cret" not in run(dsn="postgresql://me:s3cret@127.0.0.1:1/db").output


def test_no_database_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 1
    assert "FASTQ_DSN" in _checks(result)["connection"][1]


@pytest.fixture
def poor_dsn(database: Database, schema: str) -> Iterator[tuple[str, psycopg.Connection]]:
    """A role without any rights, and a superuser's connection to give it some."""
    if database.admin_dsn is None:
        pytest.skip("needs a superuser")
    name, password = f"poor_{schema}", secrets.token_hex(16)
    with closing(psycopg.connect(database.admin_dsn, autocommit=True)) as admin:
        role = sql.Identifier(name)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(password)))
        try:
            yield make_conninfo(database.dsn, user=name, password=password), admin
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_rights_that_are_missing(run: Run, poor_dsn: tuple[str, psycopg.Connection], migrated: str) -> None:
    dsn, admin = poor_dsn
    schema, role = sql.Identifier(migrated), sql.Identifier(f"poor_{migrated}")
    assert f"USAGE on schema {migrated}" in _checks(run("--json", dsn=dsn))["rights"][1]
    grants = (
        "GRANT USAGE ON SCHEMA {schema} TO {role}",
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA {schema} TO {role}",
    )
    for grant in grants:
        admin.execute(sql.SQL(grant).format(schema=schema, role=role))
    result = run("--json", dsn=dsn)
    assert result.exit_code == 1
    assert _checks(result)["rights"] == ("problem", "missing: USAGE on rid; USAGE on task_id")
    admin.execute(sql.SQL("GRANT USAGE ON ALL SEQUENCES IN SCHEMA {} TO {}").format(schema, role))
    assert run(dsn=dsn).exit_code == 0


def test_what_the_doctor_calls_enough_is_enough(
    run: Run, poor_dsn: tuple[str, psycopg.Connection], migrated: str, db: psycopg.Connection
) -> None:
    dsn, admin = poor_dsn
    schema, role = sql.Identifier(migrated), sql.Identifier(f"poor_{migrated}")
    admin.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role))
    # Ten of them are named at a time.
    while (checks := _checks(run("--json", dsn=dsn)))["rights"][0] == "problem":
        for part in checks["rights"][1].removeprefix("missing: ").partition(" and ")[0].split("; "):
            privileges, _, name = part.partition(" on ")
            kind = "SEQUENCE" if privileges == "USAGE" else "TABLE"
            admin.execute(
                sql.SQL("GRANT {} ON {} {} TO {}").format(
                    sql.SQL(privileges), sql.SQL(kind), sql.Identifier(migrated, name), role
                )
            )
    consumer = new_consumer(dsn, migrated)
    consumer.handler("t")(lambda _: None)
    consumer.handler("bad")(lambda task: task.payload["missing"])
    with Producer(dsn, schema=migrated) as producer, consumer:
        producer.enqueue_many(Task("t", idempotency_token=str(number)) for number in range(10))
        producer.enqueue_many([Task("t", delay=0.1), Task("bad", max_attempts=2)])
        wait_for_states(db, {"completed": 11, "failed": 1})
