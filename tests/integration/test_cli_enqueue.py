"""``fastq enqueue``: one task, or JSON Lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from fastq.cli import main
from tests.support.consuming import states

Run = Callable[..., Result]


@pytest.fixture
def run(dsn: str, migrated: str) -> Run:
    """Runs ``fastq enqueue`` with these arguments in this test's schema."""

    def enqueue(*args: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(main, ["enqueue", "--dsn", dsn, "--schema", migrated, *args], input=stdin)

    return enqueue


def _file(folder: Path, lines: Iterable[object]) -> str:
    path = folder / "tasks.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return str(path)


def _rows(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT type, queue, kind, max_attempts, payload FROM tasks ORDER BY id").fetchall()


def test_one_task(run: Run, db: psycopg.Connection) -> None:
    result = run("email:send", '{"to": "ä"}', "--queue", "mail", "--max-attempts", "5", "--delay", "60")
    assert (result.exit_code, result.stderr) == (0, "")
    assert _rows(db) == [("email:send", "mail", "scheduled", 5, '{"to":"ä"}')]
    assert db.execute("SELECT id FROM tasks").fetchone() == (int(result.stdout),)


def test_one_task_without_a_payload(run: Run, db: psycopg.Connection) -> None:
    assert run("t").exit_code == 0
    assert _rows(db) == [("t", "default", None, 3, "null")]


def test_one_task_as_json(run: Run) -> None:
    first = json.loads(run("t", "--token", "x", "--json").stdout)
    assert first == {"id": first["id"], "is_new": True}
    again = run("t", "--token", "x", "--json")
    assert json.loads(again.stdout) == {"id": first["id"], "is_new": False}
    assert again.exit_code == 0


def test_a_tokens_options(run: Run, db: psycopg.Connection) -> None:
    words = ("--token", "x", "--token-scope", "global", "--token-until", "ended", "--token-ttl", "60")
    first = int(run("t", "1", *words).stdout)
    assert db.execute("SELECT type, until_end, expires_at - created_at > '55 s' FROM token").fetchone() == (
        "",
        True,
        True,
    )
    assert int(run("u", "2", *words, "--on-conflict", "replace").stdout) == first
    assert _rows(db) == [("t", "default", None, 3, "2")]
    refused = run("u", *words, "--on-conflict", "raise")
    assert refused.exit_code == 1
    assert f"task {first} has this idempotency token" in f"{refused.stderr}{refused.exception}"
    assert run("t", "--token-scope", "global").exit_code == 2
    assert run("t", "--token", "x", "--on-conflict", "never").exit_code == 2


def test_a_line_whose_token_is_held_and_must_not_be_is_a_bad_one(
    run: Run, tmp_path: Path, db: psycopg.Connection
) -> None:
    lines = [{"type": "t", "payload": n, "idempotency_token": str(n % 3), "on_conflict": "raise"} for n in range(5)]
    result = run("--file", _file(tmp_path, lines), "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["enqueued"], [bad["line"] for bad in told["bad_lines"]]) == (3, [4, 5])
    assert [row[4] for row in _rows(db)] == ["0", "1", "2"]
    strict = run("--file", _file(tmp_path, [{"type": "u"}, lines[0]]), "--strict", "--json")
    assert (strict.exit_code, len(_rows(db))) == (1, 3)


def test_its_own_timeout_and_retry(run: Run, tmp_path: Path, db: psycopg.Connection) -> None:
    assert run("t", "1", "--timeout", "30", "--retry", '{"constant": 5}').exit_code == 0
    lines = [
        {"type": "t", "payload": 2, "timeout": 0.5, "retry": {"exponential": {"exponent": 2}}},
        {"type": "t", "payload": 3, "timeout": None, "retry": None},
        {"type": "t", "payload": 4, "retry": {"linear": 5}},
        {"type": "t", "payload": 5, "timeout": 0},
    ]
    result = run("--file", _file(tmp_path, lines), "--json")
    assert result.exit_code == 1
    assert [bad["line"] for bad in json.loads(result.stdout)["bad_lines"]] == [3, 4]
    assert [row[4] for row in _rows(db)] == ["1", "2", "3"]
    stored = db.execute("SELECT convert_from(payload, 'UTF8') FROM task ORDER BY id").fetchall()
    assert [text for (text,) in stored] == [
        '{"timeout":30,"retry":{"constant":5}}\n1',
        '{"timeout":0.5,"retry":{"exponential":{"exponent":2,"jitter":0.1,"maximum":86400}}}\n2',
        "3",
    ]


def test_a_time(run: Run, db: psycopg.Connection) -> None:
    assert run("t", "--run-at", "2100-01-01T00:00:00+02:00").exit_code == 0
    assert db.execute("SELECT run_at = '2099-12-31T22:00:00Z' FROM tasks").fetchone() == (True,)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a TYPE, or a --file"),
        (["t", "{"], "PAYLOAD is not JSON"),
        (["t", "NaN"], "NaN"),
        ([""], "type has 0 characters"),
        (["t", "--delay", "-1"], "delay is -1"),
        (["t", "--run-at", "2030-01-01T00:00:00"], "naive"),
        (["t", "--run-at", "soon"], "must be a time such as"),
        (["t", "--max-attempts", "0"], "max_attempts is 0"),
        (["t", "--timeout", "0"], "timeout is 0"),
        (["t", "--retry", "5s"], "--retry is not JSON"),
        (["t", "--retry", '{"constant": -5}'], "retry's constant is -5"),
        (["--file", "x", "--timeout", "5"], "names each task's type and options itself"),
        (["t", "--token", ""], "idempotency_token has 0"),
        (["t", "--strict"], "--strict belongs to --file"),
        (["t", "--file", "x"], "names each task's type and options itself"),
        (["--file", "x", "--queue", "q"], "names each task's type and options itself"),
    ],
)
def test_misuse_is_status_2(run: Run, db: psycopg.Connection, args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert states(db) == {}


def test_a_file(run: Run, db: psycopg.Connection, tmp_path: Path) -> None:
    lines = [{"type": "a", "payload": number} for number in range(25_000)]
    lines.append({"type": "b", "queue": "q", "delay": 60, "max_attempts": 1, "idempotency_token": "x"})
    result = run("--file", _file(tmp_path, lines))
    assert (result.exit_code, result.stderr, result.stdout) == (0, "", "enqueued 25,001 tasks\n")
    assert db.execute("SELECT count(DISTINCT payload) FROM tasks WHERE type = 'a'").fetchone() == (25_000,)
    assert db.execute("SELECT queue, kind, max_attempts FROM tasks WHERE type = 'b'").fetchone() == (
        "q",
        "scheduled",
        1,
    )


def test_standard_input(run: Run, db: psycopg.Connection) -> None:
    result = run("--file", "-", "--json", stdin=b'{"type": "a"}\n\n{"type": "b"}')
    assert json.loads(result.stdout) == {"enqueued": 2, "duplicates": 0, "bad_lines": []}
    assert states(db) == {"pending": 2}


def test_bad_lines_are_reported_with_their_numbers_and_left_out(
    run: Run, db: psycopg.Connection, tmp_path: Path
) -> None:
    lines: list[object] = [
        {"type": "a"},
        "{bad",
        "",
        {"type": "a", "weight": 1},
        {"type": "x" * 256},
        {"type": "a", "payload": "x" * 1024 * 1024},
        {"type": "a", "delay": -1},
        {"type": "a"},
    ]
    result = run("--file", _file(tmp_path, lines))
    assert result.exit_code == 1
    assert states(db) == {"pending": 2}
    reported = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in reported] == [f"line {number} left out" for number in (2, 4, 5, 6, 7)]
    assert "unknown key 'weight'" in reported[1]
    assert result.stdout == "enqueued 2 tasks; 5 bad lines\n"


def test_bad_lines_as_json(run: Run, tmp_path: Path) -> None:
    result = run("--file", _file(tmp_path, ["{bad", {"type": "a"}]), "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert (answer["enqueued"], answer["bad_lines"][0]["line"]) == (1, 1)


@pytest.mark.parametrize("before", [0, 3, 25_000])
def test_strict_writes_nothing_at_a_bad_line(run: Run, db: psycopg.Connection, tmp_path: Path, before: int) -> None:
    lines: list[object] = [{"type": "a", "payload": number} for number in range(before)]
    result = run("--strict", "--file", _file(tmp_path, [*lines, "{bad", {"type": "a"}]))
    assert result.exit_code == 1
    assert f"line {before + 1}: it is not JSON" in result.stderr
    assert result.stdout == "enqueued 0 tasks; 1 bad lines\n"
    assert states(db) == {}


def test_strict_writes_all_of_a_good_file(run: Run, db: psycopg.Connection, tmp_path: Path) -> None:
    result = run("--strict", "--file", _file(tmp_path, [{"type": "a"}] * 12_000))
    assert (result.exit_code, result.stdout) == (0, "enqueued 12,000 tasks\n")
    assert states(db) == {"pending": 12_000}


def test_a_file_again_with_tokens_adds_nothing(run: Run, db: psycopg.Connection, tmp_path: Path) -> None:
    path = _file(tmp_path, [{"type": "a", "idempotency_token": str(number)} for number in range(100)])
    run("--file", path)
    assert run("--file", path).stdout == "enqueued 0 tasks; 100 were there before\n"
    assert run("--strict", "--file", path).stdout == "enqueued 0 tasks; 100 were there before\n"
    assert states(db) == {"pending": 100}


def test_files_that_can_not_be_read(run: Run, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no file"), (tmp_path, "is a folder")):
        result = run("--file", str(path))
        assert result.exit_code == 1
        assert message in result.stderr


def test_what_is_in_is_said_when_the_database_fails(
    run: Run, db: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second batch meets a table that takes no more.
    lines = [{"type": "a"}] * 15_000
    path = _file(tmp_path, lines)
    from fastq import producer  # noqa: PLC0415 - to reach in

    enqueue_many = producer.Producer.enqueue_many
    calls = 0

    def then_break(self: producer.Producer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            db.execute("ALTER TABLE ready ADD CONSTRAINT full_up CHECK (false) NOT VALID")
        return enqueue_many(self, *args, **kwargs)

    monkeypatch.setattr(producer.Producer, "enqueue_many", then_break)
    result = run("--file", path)
    assert result.exit_code == 1
    assert "stopped: 10,000 tasks are in, from the lines up to 10000" in result.stderr
    assert states(db) == {"pending": 10_000}


def test_a_slow_pipe_holds_no_transaction_open(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    command = [sys.executable, "-m", "fastq", "enqueue", "--dsn", dsn, "--schema", migrated, "--file", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert isinstance(process.stdin, io.TextIOWrapper)
        process.stdin.write('{"type": "a"}\n')
        process.stdin.flush()
        open_ones = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' AND query LIKE %s"
        assert db.execute(open_ones.replace("in%'", "in%%'"), [f"%{migrated}%"]).fetchone() == (0,)
        process.stdin.write('{"type": "b"}\n')
        out, _ = process.communicate(timeout=30)
    assert out == "enqueued 2 tasks\n"
    assert states(db) == {"pending": 2}


def test_a_schema_that_is_not_migrated(dsn: str, schema: str) -> None:
    result = CliRunner().invoke(main, ["enqueue", "--dsn", dsn, "--schema", schema, "t"])
    assert result.exit_code == 1
    assert "fastq migrate" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_password_is_shown() -> None:
    result = CliRunner().invoke(main, ["enqueue", "--dsn", "postgresql://me:s3cret@127.0.0.1:1/db", "t"])
    assert result.exit_code == 1
    assert "s3cret" not in result.output
