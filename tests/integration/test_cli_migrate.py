"""``fastq migrate``: up, down, and a look."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest
from click.testing import CliRunner, Result

from fastq import Producer, Task
from fastq.cli import main
from fastq.migrations import grants, status

Run = Callable[..., Result]


@pytest.fixture
def run(dsn: str, schema: str) -> Run:
    """Runs ``fastq migrate`` with these arguments on this test's schema."""
    return lambda *args: CliRunner().invoke(main, ["migrate", "--dsn", dsn, "--schema", schema, *args])


@pytest.fixture
def latest(dsn: str, schema: str) -> int:
    return status(dsn, schema=schema).latest


def test_up_and_again(run: Run, schema: str, db: psycopg.Connection) -> None:
    first = run()
    assert first.exit_code == 0
    assert "applied step 1: initial" in first.stdout
    assert run().stdout == f"schema '{schema}': nothing was missing\n"
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


def test_as_json(run: Run, schema: str, latest: int) -> None:
    steps = list(range(1, latest + 1))
    assert json.loads(run("--json").stdout) == {"schema": schema, "applied": steps}
    assert json.loads(run("--json").stdout) == {"schema": schema, "applied": []}
    found = json.loads(run("--status", "--json").stdout)
    assert (found["version"], found["latest"], [step["version"] for step in found["steps"]]) == (latest, latest, steps)
    assert found["steps"][0]["applied_at"] is not None
    assert json.loads(run("--down", "0", "--yes", "--json").stdout) == {"schema": schema, "undone": steps[::-1]}


def test_status_of_a_schema_that_is_not_there(run: Run, schema: str, latest: int) -> None:
    result = run("--status")
    assert result.exit_code == 0
    assert f"schema '{schema}' is at step 0; this fastq knows {latest}" in result.stdout
    assert "not applied" in result.stdout


def test_down_says_what_it_would_delete_and_wants_yes(run: Run, dsn: str, schema: str, db: psycopg.Connection) -> None:
    run()
    with Producer(dsn, schema=schema) as producer:
        producer.enqueue_many(Task("t") for _ in range(3))
    asked = run("--down", "0")
    assert asked.exit_code == 1
    assert "would undo step 1: initial" in asked.stdout
    assert "would delete table task: 3 rows" in asked.stdout
    assert "--yes" in asked.stderr
    preview = json.loads(run("--down", "0", "--json").stdout)
    assert preview["would_delete"]["task"] == 3
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (3,)
    done = run("--down", "0", "--yes")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "undone step 1: initial")
    assert db.execute("SELECT to_regclass('tasks')").fetchone() == (None,)


@pytest.mark.parametrize(
    ("args", "status_code", "message"),
    [
        (["--target", "99"], 1, "target is 99"),
        (["--target", "1", "--down", "0"], 2, "exclude each other"),
        (["--status", "--down", "0"], 2, "exclude each other"),
        (["--yes"], 2, "--yes belongs to --down"),
        (["--grants", "--status"], 2, "exclude each other"),
        (["--viewer", "me"], 2, "--worker, --producer, --handler, --viewer belong to --grants"),
        (["--down", "0"], 1, "not migrated"),
    ],
)
def test_misuse(run: Run, args: list[str], status_code: int, message: str) -> None:
    result = run(*args)
    assert result.exit_code == status_code
    assert message in result.stderr


def test_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    result = CliRunner().invoke(main, ["migrate"])
    assert result.exit_code == 1
    assert "FASTQ_DSN" in result.stderr


def test_grants_are_printed_without_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    result = CliRunner().invoke(main, ["migrate", "--grants", "--schema", "s"])
    assert (result.exit_code, result.stdout) == (0, grants(schema="s"))
    names = {"worker": "w", "viewer": 'v"'}
    options = [f"--{kind}={name}" for kind, name in names.items()]
    result = CliRunner().invoke(main, ["migrate", "--grants", "--json", "--schema", "s", *options])
    assert json.loads(result.stdout) == {"schema": "s", "sql": grants(schema="s", worker="w", viewer='v"')}
    result = CliRunner().invoke(main, ["migrate", "--grants", "--worker", "public"])
    assert result.exit_code == 1
    assert "must be a role's name" in result.stderr


def test_a_schema_name_that_postgresql_would_cut(dsn: str) -> None:
    for name in ("x" * 64, "", "pg_mine"):
        result = CliRunner().invoke(main, ["migrate", "--dsn", dsn, "--schema", name])
        assert result.exit_code == 1
        assert "schema" in result.stderr
