"""``fastq bench`` on a real server: its figures, its proof, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fastq.bench import (
    Batch1,
    BenchError,
    Drain,
    Enqueue,
    Foreign,
    Latency,
    Lists,
    Result,
    Retention,
    Single,
    Snapshot,
    Steady,
)
from fastq.bench._hold import Hold
from fastq.bench._meter import Meter
from fastq.bench._processes import is_here
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker
from fastq.bench._verify import check_enqueued
from fastq.bench.retention import Load as RetentionLoad
from fastq.errors import DatabaseError, SettingsError
from tests.support.databases import Database
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def strangers(dsn: str) -> Iterator[set[str]]:
    """The schemas of other benchmarks. None may be there afterwards that was not there before."""
    before = _all_schemas(dsn)
    yield before
    assert _all_schemas(dsn) <= before


def _all_schemas(dsn: str) -> set[str]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'fastq\\_bench\\_%'").fetchall()
    return {name for (name,) in rows}


def _costs(figures: dict[str, Any], database: Database) -> None:
    assert figures["client_cpu_us"] > 0
    assert figures["wal_bytes"] > 0
    if database.admin_dsn is not None and sys.platform == "linux" and _is_local(database):
        assert figures["server_cpu_us"] > 0
        assert figures["server_other_cpu_us"] >= 0


def _is_local(database: Database) -> bool:
    with psycopg.connect(database.dsn) as connection:
        [row] = connection.execute(
            "SELECT pid, extract(epoch FROM clock_timestamp() - backend_start)::float8 FROM pg_stat_activity "
            "WHERE pid = pg_backend_pid()"
        ).fetchall()
    return is_here(*row)


@pytest.mark.parametrize("tokens", [False, True])
def test_enqueue(dsn: str, database: Database, tokens: bool) -> None:
    found = Enqueue(tasks=2_500, batch=1_000, tokens=tokens).run(dsn).to_json()
    assert (found["tasks"], found["settings"]["tokens"]) == (2_500, tokens)
    assert found["tasks_per_s"] == pytest.approx(2_500 / found["seconds"], rel=1e-4)
    assert found["tasks_per_commit"] == pytest.approx(2_500 / 3, rel=1e-4)
    _costs(found, database)


@pytest.mark.parametrize("handler", ["sync", "async"])
def test_drain(dsn: str, database: Database, handler: Any) -> None:
    found = Drain(tasks=3_000, handler=handler).run(dsn).to_json()
    assert found["tasks_per_s"] == pytest.approx(3_000 / found["seconds"], rel=1e-4)
    assert found["tasks_per_claim"] > 1
    assert found["tasks_per_flush"] > 1
    assert found["of_bare"] is None
    assert found["server"]["is_superuser"] is False
    _costs(found, database)


@pytest.mark.parametrize("handler", ["sync", "async"])
def test_drain_with_work_is_compared_with_a_bare_loop(dsn: str, monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    monkeypatch.setattr("fastq.bench._handlers._BARE_SECONDS", 0.2)
    found = Drain(tasks=200, handler=handler, work_ms=5, concurrency=4).run(dsn).to_json()
    assert 0 < found["bare_per_s"] <= 4 / 0.005
    assert found["of_bare"] == pytest.approx(found["tasks_per_s"] / found["bare_per_s"], rel=1e-4)


def test_steady(dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastq.bench.steady.WARM_UP", 0.5)
    found = Steady(seconds=1.5).run(dsn).to_json()
    assert found["tasks_per_s"] == pytest.approx(found["tasks"] / 1.5, rel=0.8)
    assert 0 <= found["backlog_least"] <= found["backlog_most"] <= 50_000
    _costs(found, database)


def test_snapshot(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastq.bench.snapshot.WARM_UP", 0.5)
    found = Snapshot(seconds=1.5).run(dsn).to_json()
    assert found["held_over_free"] == pytest.approx(found["tasks_per_s"] / found["free_per_s"], rel=1e-4)
    assert found["last_over_first"] > 0
    assert found["transactions_held"] > 1


@pytest.mark.parametrize("archive", [False, True])
def test_retention(dsn: str, database: Database, archive: bool) -> None:
    found = Retention(rate=200, keep=1, seconds=8, archive=archive).run(dsn).to_json()
    assert found["tasks_per_s"] == pytest.approx(found["tasks"] / found["seconds"], rel=1e-4)
    assert found["leaves_emptied"] >= 1
    assert found["payloads_lost"] == 0
    for what in ("start", "answer"):
        assert 0 < found[f"{what}_p50_ms"] <= found[f"{what}_p99_ms"] <= found[f"{what}_most_ms"]
        assert 0 < found[f"{what}_emptying_probes"] < found[f"{what}_probes"]
        assert found[f"{what}_emptying_most_ms"] <= found[f"{what}_most_ms"]
    assert found["last_over_middle"] > 0
    assert len(found["series"]) >= 10
    assert [one["at_s"] for one in found["series"]] == sorted(one["at_s"] for one in found["series"])
    assert (found["series"][-1]["archive_mb"] > 0.05) == archive
    _costs(found, database)


def test_retention_that_loses_a_payload_gives_no_figure(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody changes what waits."""
    wait_for_rest = RetentionLoad.finish

    def finish(load: RetentionLoad) -> None:
        with psycopg.connect(dsn) as connection:
            connection.execute(
                sql.SQL("UPDATE {}.task SET payload = '{{}}' WHERE id = %s").format(sql.Identifier(load.session.name)),
                [min(load.held)],
            )
        wait_for_rest(load)

    monkeypatch.setattr(RetentionLoad, "finish", finish)
    with pytest.raises(BenchError, match="1 tasks came without their payload"):
        Retention(rate=100, keep=1, seconds=2).run(dsn)


@pytest.mark.parametrize("handler", ["sync", "async"])
def test_latency(dsn: str, handler: Any) -> None:
    found = Latency(tasks=5, handler=handler, idle_seconds=1).run(dsn).to_json()
    assert 0 < found["enqueue_p50_ms"] <= found["enqueue_p99_ms"]
    # Handlers may start before the enqueue is answered.
    assert 0 < found["p50_ms"] <= found["p99_ms"] == found["most_ms"]
    assert found["idle_statements_per_s"] > 0
    assert 0 < found["idle_cpu_percent"] < 100


@pytest.mark.parametrize(
    ("bench", "settings"),
    [
        (Single(tasks=501, coroutines=8), {"coroutines": 8, "tokens": False}),
        (Single(tasks=203, threads=4, tokens=True), {"threads": 4, "tokens": True}),
    ],
)
def test_single(dsn: str, database: Database, bench: Single, settings: dict[str, Any]) -> None:
    found = bench.run(dsn).to_json()
    assert found["settings"] == settings | {"payload_bytes": 70}
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["tasks_per_commit"] >= 1
    _costs(found, database)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_lists(dsn: str, *, one_by_one: bool) -> None:
    bench = Lists(pending=50_000, completed=50_000, failed=700, one_by_one=one_by_one, page=20, calls=2)
    found = bench.run(dsn).to_json()
    assert found["tasks"] == 100_700
    whats = [one["what"] for one in found["measured"]]
    assert len(set(whats)) == len(whats)
    assert {"all, falling, page 1", "all, rising, page 20", "a type, 1 %, rising, page 20"} <= set(whats)
    for kind in ("counts", "page", "rare"):
        assert 0 < found[f"{kind}_p50_ms"] <= found[f"{kind}_p99_ms"]
    assert found["by_time_p50_ms"] > 0


def test_lists_needs_enough_for_its_hundredths(dsn: str) -> None:
    with pytest.raises(SettingsError, match="50,000"):
        Lists(pending=49_999).run(dsn)


@pytest.mark.parametrize(("one_by_one", "same_queue"), [(False, False), (True, True)])
def test_foreign(dsn: str, *, one_by_one: bool, same_queue: bool) -> None:
    bench = Foreign(foreign=1_200, tasks=1_000, pairs=2, one_by_one=one_by_one, same_queue=same_queue)
    found = bench.run(dsn).to_json()
    assert found["tasks"] == 2_000
    # Of pairs in turn, where what the machine does beside them falls on either: no more can be said of two that are so short.
    assert min(found["tasks_per_s"], found["alone_per_s"]) > 0
    assert 0 < found["least_of_alone"] <= found["beside_of_alone"]


def test_batch1(dsn: str, database: Database) -> None:
    found = Batch1(tasks=5, turns=2).run(dsn).to_json()
    assert found["tasks"] == 10
    assert found["tasks_per_flush"] == 1
    # The log is the server's, and others write it, too.
    assert min(found["wal_bytes"], found["peer_wal_bytes"], found["wal_of_peer"]) > 0
    if database.admin_dsn is not None and sys.platform == "linux" and _is_local(database):
        assert found["server_cpu_us"] > 0
        assert found["peer_cpu_us"] > 0
        assert found["cpu_of_peer"] > 0


# --- its proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        ("DELETE FROM {}.done WHERE lo = (SELECT max(lo) FROM {}.done)", "enqueued tasks are not completed"),
        ("INSERT INTO {}.done SELECT * FROM {}.done LIMIT 1", "some completed more than once"),
        ("INSERT INTO {}.attempt_error (id, consumer, no, attempt, error) SELECT 1, 1, 1, 1, ''", "1 errors"),
        ("DELETE FROM {}.task WHERE id = (SELECT max(id) FROM {}.task)", "1,999 tasks instead of 2,000"),
    ],
)
def test_no_figure_where_the_tables_disagree(dsn: str, strangers: set[str], sabotage: str, says: str) -> None:
    def run() -> Result:
        return Drain(tasks=2_000).run(dsn, _at("checking", lambda: _spoil(dsn, strangers, sabotage)))

    with pytest.raises(BenchError, match=says):
        run()


def test_no_figure_where_a_task_waits_that_was_not_enqueued(dsn: str, strangers: set[str]) -> None:
    sabotage = "UPDATE {}.ready SET hi = hi + 1 WHERE hi = (SELECT max(hi) FROM {}.ready)"
    with Session(dsn) as session:
        producer = session.producer()
        results = producer.enqueue_many(TaskMaker().stream(600))
        _spoil(dsn, strangers, sabotage)
        with pytest.raises(BenchError, match="601 ready instead of 600"):
            check_enqueued(session.db, [results])


def test_a_snapshot_that_is_not_held_is_no_measurement(dsn: str) -> None:
    with Session(dsn) as session, Hold(session) as hold:
        session.db.query("lock_migrations", session.name)
        assert hold.check() >= 0
        hold._db.run("ROLLBACK")
        with pytest.raises(BenchError, match="holds none, or has ended"):
            hold.check()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _at(when: str, act: Callable[[], None]) -> Any:
    def progress(what: str, _total: int | None, _done: Callable[[], float]) -> Any:
        if what == when:
            act()
        return _nothing()

    return progress


def _spoil(dsn: str, strangers: set[str], statement: str) -> None:
    [schema] = _all_schemas(dsn) - strangers
    with psycopg.connect(dsn) as connection:
        name = sql.Identifier(schema)
        connection.execute(sql.SQL(statement).format(*[name] * statement.count("{}")))


# --- its surroundings ------------------------------------------------------------------------------


def test_only_its_own_backends_are_counted(dsn: str, database: Database) -> None:
    if not _is_local(database):
        pytest.skip("the server's processes can't be seen from here")
    with Session(dsn) as session, Meter(session) as meter, psycopg.connect(dsn) as stranger:
        with session.producer() as producer:
            producer.enqueue_many(TaskMaker().stream(1_000))
            used = meter.read().server_cpu
            assert used is not None
            assert used > 0
        stranger.execute("SELECT count(*) FROM generate_series(1, 300000)")
        session.db.run("SELECT count(*) FROM generate_series(1, 300000)")
        after = meter.read().server_cpu
        assert after is not None
        # Its backend has ended, and what it used still counts.
        assert used <= after < used + 0.01


def test_a_database_that_cannot_be_reached_is_said_as_that() -> None:
    with pytest.raises(DatabaseError, match="could not connect") as error:
        Drain(tasks=1).run("postgresql://somebody:geheim@127.0.0.1:1/nowhere")
    assert "geheim" not in str(error.value)


def test_the_command_prints_one_json_object(dsn: str) -> None:
    done = _command(dsn, "drain", "--tasks", "500", "--json")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["bench"], found["tasks"], found["settings"]["concurrency"]) == ("drain", 500, 32)


def test_the_command_prints_a_table_for_people(dsn: str) -> None:
    done = _command(dsn, "enqueue", "--tasks", "500", "--batch", "100")
    assert done.returncode == 0, done.stderr
    assert "tasks/s" in done.stdout
    assert "fsync=" in done.stdout
    assert "every task done exactly once" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("drain", "--payload-bytes", "5"),
        ("steady", "--batch", "45001"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(dsn: str, arguments: tuple[str, ...]) -> None:
    done = _command(dsn, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "must be from" in done.stderr


def test_the_command_does_not_take_both_kinds_of_callers(dsn: str) -> None:
    done = _command(dsn, "single", "--threads", "2", "--coroutines", "2")
    assert (done.returncode, done.stdout) == (2, "")


def _command(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastq", "bench", *arguments, "--dsn", dsn]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (("drain", "--tasks", "400000"), signal.SIGINT),
        (("steady",), signal.SIGTERM),
        (("single", "--threads", "4"), signal.SIGTERM),
        (("single",), signal.SIGINT),
    ],
)
def test_a_signal_ends_it_and_its_schema(
    dsn: str, strangers: set[str], arguments: tuple[str, ...], number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "fastq", "bench", *arguments, "--dsn", dsn]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: _is_working(dsn, strangers), timeout=30, message="tasks in the benchmark's schema")
        process.send_signal(number)
        # Impatient people press it twice.
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    assert (process.returncode, stdout) == (128 + number, ""), stderr
    assert "the benchmark's schema is dropped" in stderr


def _is_working(dsn: str, strangers: set[str]) -> bool:
    [schema] = _all_schemas(dsn) - strangers
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(schema, "task"))
        ).fetchone()
    return row == (True,)
