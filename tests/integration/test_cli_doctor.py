"""``fastq doctor``: what is wrong with a database."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo
from rich.console import Console

from fastq import Producer, Task
from fastq.cli import main
from fastq.cli.doctor import _print, _server, doctor
from fastq.cli.doctor._checks import Check, span
from fastq.rights import Kind
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.databases import Database
from tests.support.faults.server import PrivateServer
from tests.support.faults.standby import Standby
from tests.support.lab import Lab
from tests.support.roles import Roles, database_with_admin
from tests.support.waiting import wait_until

Run = Callable[..., Result]


@pytest.fixture
def run(dsn: str, schema: str) -> Run:
    """Runs ``fastq doctor`` on this test's schema."""

    def ask(*args: str, dsn: str = dsn) -> Result:
        return CliRunner().invoke(main, ["doctor", "--dsn", dsn, "--schema", schema, *args])

    return ask


def _all(result: Result) -> list[dict[str, str]]:
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    checks: list[dict[str, str]] = answer["checks"]
    assert all(
        check["status"] in ("ok", "info") or check["advice"] for check in checks if check["name"] not in _TELLING
    )
    return checks


def _checks(result: Result) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["message"]) for check in _all(result)}


#: Their messages are an error's, which says itself what to do.
_TELLING = ("connection", "schema")


def user_of(dsn: str) -> str:
    user = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
    assert isinstance(user, str)
    return user


def test_a_database_in_order(run: Run, dsn: str, migrated: str) -> None:
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
    assert {name for name, (status, _) in checks.items() if status != "ok"} == {"leader"}
    assert checks["leader"] == ("info", "nobody leads: delayed tasks, rescue and retention wait for a worker")
    assert checks["consumers"] == ("ok", "none alive")
    role = user_of(dsn)
    assert checks["rights"][1].startswith(f"role {role!r} may migrate, work, enqueue and look")


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
    assert _checks(run("--json"))["waiting"][0] == "ok"


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


# --- rights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Database]:
    """A database in which roles can be made, and a superuser's things be done."""
    with database_with_admin(database) as found:
        yield found


@pytest.fixture(scope="module")
def dsn(server: Database) -> str:
    return server.dsn


@pytest.fixture
def roles(server: Database, migrated: str) -> Iterator[Roles]:
    with Roles(server, migrated) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "may"),
    [
        ("worker", "may work, enqueue and look, and not migrate: a worker's rights"),
        ("producer", "may enqueue, and nothing else: a producer's rights"),
        ("handler", "may complete tasks in transactions, and nothing else: a handler's rights"),
        ("viewer", "may look, and nothing else: a viewer's rights"),
    ],
)
def test_a_limited_role_is_told_what_it_may_do(run: Run, roles: Roles, kind: Kind, may: str) -> None:
    name, dsn = roles.new(kind)
    result = run("--json", dsn=dsn)
    checks = _checks(result)
    assert checks["rights"] == ("ok", f"role {name!r} {may}")
    assert result.exit_code == 0
    if kind in ("producer", "handler"):
        assert checks["tasks"] == ("info", f"consumers, claims and failures were not looked at: role {name!r} may not")
        assert "claims" not in checks
    else:
        assert {"consumers", "claims", "refused", "waiting", "failures", "leader", "leaves"} <= checks.keys()


def test_a_producer_that_may_look_is_both(run: Run, roles: Roles) -> None:
    name, dsn = roles.new("producer")
    roles.grant(name, "viewer")
    assert _checks(run("--json", dsn=dsn))["rights"] == (
        "ok",
        f"role {name!r} may enqueue and look, and nothing else: a producer's and a viewer's rights",
    )


def test_a_role_without_any_right(run: Run, roles: Roles, migrated: str) -> None:
    name, dsn = roles.add()
    result = run("--json", dsn=dsn)
    assert result.exit_code == 1
    assert _checks(result)["rights"][1].startswith(
        f"role {name!r} may not even look; missing: USAGE on schema {migrated}; SELECT on migration"
    )


@pytest.mark.parametrize(
    ("kind", "taken", "lacking"),
    [
        ("worker", "TRUNCATE ON {s}.task_03", "TRUNCATE on task_03"),
        ("worker", "USAGE ON SEQUENCE {s}.rid", "USAGE on rid"),
        ("worker", "UPDATE, DELETE ON {s}.claim", "UPDATE, DELETE on claim"),
        ("worker", "SELECT ON {s}.migration", "SELECT on migration"),
        ("producer", "INSERT ON {s}.ready", "INSERT on ready"),
        ("handler", "INSERT ON {s}.done", "INSERT on done"),
        ("viewer", "SELECT ON {s}.claim", "SELECT on claim"),
    ],
)
def test_a_role_that_was_meant_for_more(
    run: Run, roles: Roles, migrated: str, kind: Kind, taken: str, lacking: str
) -> None:
    """One right short of a worker, it is a broken worker, and not a sound viewer."""
    name, dsn = roles.new(kind)
    roles.as_owner(f'REVOKE {taken.format(s=migrated)} FROM "{name}"')
    result = run("--json", dsn=dsn)
    [check] = [check for check in _all(result) if check["name"] == "rights"]
    assert result.exit_code == 1
    assert check["status"] == "problem"
    assert check["message"].endswith(f"; missing: {lacking}")
    if kind != "viewer":
        assert f"has some of a {kind}'s rights" in check["message"]
        assert f"--grants --{kind} {name}" in check["advice"]


def test_what_the_doctor_calls_enough_is_enough(run: Run, roles: Roles, migrated: str, db: psycopg.Connection) -> None:
    """Granted one by one as they are named, from none."""
    name, dsn = roles.add()
    while (rights := _checks(run("--json", dsn=dsn))["rights"])[1] != (
        f"role {name!r} may work, enqueue and look, and not migrate: a worker's rights"
    ):
        missing = rights[1].partition("; missing: ")[2]
        if not missing:
            # A viewer by now: somebody means it for more.
            missing = "UPDATE on leaf"
        for part in missing.split("; "):
            privileges, _, object_ = part.partition(" on ")
            first, _, more = object_.partition(" and ")
            leaves = [f"{first[:-2]}{n:02}" for n in range(16)] if more else [first]
            for leaf in leaves:
                kind = "SEQUENCE " if privileges == "USAGE" else ""
                where = f"SCHEMA {migrated}" if leaf.startswith("schema ") else f"{kind}{migrated}.{leaf}"
                roles.as_owner(f'GRANT {privileges} ON {where} TO "{name}"')
    consumer = new_consumer(dsn, migrated)
    consumer.handler("t")(lambda _: None)
    consumer.handler("bad")(lambda task: task.payload["missing"])
    with Producer(dsn, schema=migrated) as producer, consumer:
        producer.enqueue_many(Task("t", idempotency_token=str(number)) for number in range(10))
        producer.enqueue_many([Task("t", delay=0.1), Task("bad", max_attempts=2)])
        wait_for_states(db, {"completed": 11, "failed": 1})


# --- consumers, claims, results ------------------------------------------------------------------


def _consumer(db: psycopg.Connection, id_: int, *, silent: float = 0, dead: float | None = None) -> None:
    """One that was registered, silent for so many seconds, declared dead so many ago."""
    db.execute(
        "INSERT INTO consumer (id, pid, host, version, types, beat_at, dead_at) VALUES (%s, %s, 'box', '0.1.0', '{t}', "
        "clock_timestamp() - %s * interval '1 s', clock_timestamp() - %s * interval '1 s')",
        [id_, id_, silent, dead],
    )


def _claim(db: psycopg.Connection, consumer: int, ids: str, age: float) -> None:
    db.execute("INSERT INTO lane (queue, type) VALUES ('default', 't') ON CONFLICT DO NOTHING")
    db.execute(
        "INSERT INTO claim (consumer, no, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, ids) "
        "VALUES (%s, 1, clock_timestamp() - %s * interval '1 s', 1, 0, 0, 0, 3, 2, %s)",
        [consumer, age, ids],
    )


def test_a_silent_consumer(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7, silent=42)
    _claim(db, 7, "{[1,4)}", 60)
    status, message = _checks(run("--json"))["silent"]
    assert (status, message) == ("warning", "not heard of: process 7 on box (fastq 0.1.0) for 42 s, holding 3 tasks")
    db.execute("UPDATE consumer SET beat_at = clock_timestamp() - interval '3 min'")
    [check] = [check for check in _all(run("--json")) if check["name"] == "silent"]
    assert check["status"] == "problem"
    assert check["advice"].startswith("start a worker, of any type")


def test_a_heartbeat_from_the_future(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7, silent=-600)
    status, message = _checks(run("--json"))["silent"]
    assert status == "problem"
    assert "process 7 on box (fastq 0.1.0), whose last heartbeat lies 10 min ahead: the clock was set back" in message


def test_a_dead_consumer_whose_tasks_nobody_rescues(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7, silent=200, dead=190)
    _claim(db, 7, "{[1,4)}", 300)
    _claim(db, 8, "{[10,11)}", 300)
    result = run("--json")
    assert result.exit_code == 1
    status, message = _checks(result)["claims"]
    assert status == "problem"
    assert "3 tasks in 1 claim of process 7 on box, the oldest for 5 min" in message
    assert "1 task in 1 claim of a consumer that nobody knows any more, the oldest for 5 min" in message
    assert _checks(result)["dead"] == ("info", "process 7 on box, dead for 3 min, holding 3 tasks")


def test_one_that_died_just_now_is_being_rescued(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7, silent=14, dead=5)
    _claim(db, 7, "{[1,4)}", 20)
    assert _checks(run("--json"))["claims"][0] == "ok"


def test_a_task_that_runs_for_very_long(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7)
    _claim(db, 7, "{[1,4)}", 7200)
    assert "long" not in _checks(run("--json")), "it waits in the worker, and does not run"
    db.execute("UPDATE consumer SET running = '{[2,3)}'")
    text = "process 7 on box has run 1 task of 't' for 2 h"
    assert _checks(run("--json"))["long"] == ("info", text)
    done = "INSERT INTO done (lo, consumer, no, took_us, lane, leaf, attempts, ids) VALUES (90, 7, 9, %s, 1, 0, 1, '{[90,92)}')"
    db.execute(done, [120_000_000])
    assert _checks(run("--json"))["long"] == ("info", f"{text}; usually it takes 60 s")
    db.execute(done, [2_400_000_000])
    assert "long" not in _checks(run("--json")), "its type takes so long"


def test_results_that_were_refused_are_counted_by_their_worker(
    run: Run, dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    """A worker that stands still is taken for dead; what it then says of its task does not count, and it says how often that was."""
    with Lab(dsn, migrated, db, tmp_path) as lab:
        gate, frozen = lab.gate(), lab.worker()
        [task] = lab.enqueue(gate.orders)
        wait_until(lambda: lab.journal.started() == [task])
        first = lab.consumer_id(pid=frozen.pid)
        lab.wait_for_beat(first, running=[task])
        assert _checks(run("--json"))["refused"] == ("ok", "no result of a living worker was refused")
        frozen.freeze()
        lab.consumer()
        wait_until(lambda: lab.claimed(first) == set(), message="the rescue")
        gate.open()
        frozen.thaw()
        wait_until(lambda: lab.all("SELECT FROM consumer WHERE refused > 0"), message="its heartbeat")
        result = run("--json")
        assert result.exit_code == 0, result.stdout
        status, message = _checks(result)["refused"]
        assert status == "warning"
        assert message.startswith(f"1 result of process {frozen.pid} on ")
        since = lab.value("SELECT refused_at FROM consumer WHERE refused > 0")
        # It is told with each heartbeat, and its time is the last new one's.
        beat = lab.value("SELECT beat_at FROM consumer WHERE refused > 0")
        wait_until(lambda: lab.value("SELECT beat_at FROM consumer WHERE refused > 0") > beat)
        assert lab.value("SELECT refused_at FROM consumer WHERE refused > 0") == since
        db.execute("UPDATE consumer SET refused_at = refused_at - interval '3 h'")
        assert _checks(run("--json"))["refused"][0] == "info"


def test_tasks_that_failed_lately(run: Run, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    consumer = new_consumer(dsn, migrated)
    for name in ("a", "b"):
        consumer.handler(name)(lambda task: task.payload["missing"])
    with Producer(dsn, schema=migrated) as producer, consumer:
        ids = [result.id for result in producer.enqueue_many(Task(name, max_attempts=1) for name in "aab")]
        wait_for_states(db, {"failed": 3})
    [check] = [check for check in _all(run("--json")) if check["name"] == "failures"]
    assert (check["status"], check["message"]) == (
        "warning",
        "3 tasks failed for good in the last 60 min: 'a' 2; 'b' 1",
    )
    assert f"Client.get_task({ids[1]})" in check["advice"]
    db.execute("UPDATE dead SET ended_at = ended_at - interval '2 h'")
    assert _checks(run("--json"))["failures"][0] == "ok"


# --- leader and leaves ---------------------------------------------------------------------------


def test_nobody_leads_though_workers_live(run: Run, migrated: str, db: psycopg.Connection) -> None:
    _consumer(db, 7)
    db.execute("INSERT INTO leader (holder, term, expires_at) VALUES (7, 3, clock_timestamp() - interval '10 min')")
    result = run("--json")
    assert result.exit_code == 1
    status, message = _checks(result)["leader"]
    assert (status, message.partition(",")[0]) == ("problem", "nobody has led for 10 min")
    db.execute("UPDATE leader SET expires_at = clock_timestamp() + interval '5 s'")
    assert _checks(run("--json"))["leader"] == ("ok", "process 7 on box leads (term 3)")
    db.execute("UPDATE leader SET expires_at = clock_timestamp() + interval '10 min'")
    status, message = _checks(run("--json"))["leader"]
    assert status == "problem"
    assert "the clock was set back" in message


def test_a_delayed_task_that_nobody_makes_ready(run: Run, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with Producer(dsn, schema=migrated) as producer:
        producer.enqueue(Task("t", delay=60))
    _consumer(db, 7)
    assert "delayed" not in _checks(run("--json"))
    db.execute("UPDATE delayed SET run_at = clock_timestamp() - interval '3 min'")
    assert _checks(run("--json"))["delayed"] == ("problem", "the first delayed task has been due for 3 min")


def test_leaves_that_are_all_in_use(run: Run, migrated: str, db: psycopg.Connection) -> None:
    assert _checks(run("--json"))["leaves"] == ("ok", "1 of 16 in use")
    db.execute(
        "UPDATE leaf SET state = 'closed', closed_at = clock_timestamp() - (20 - no) * interval '1 h' WHERE no > 0"
    )
    _claim(db, 8, "{[1,2)}", 1)
    db.execute("UPDATE claim SET leaf = 1")
    status, message = _checks(run("--json"))["leaves"]
    assert status == "warning"
    assert message.startswith("16 of 16 in use, so the open one grows: the oldest, 1, was closed 19 h ago, ")
    assert message.endswith("is named by 1 claim of tasks that run")


# --- the server ----------------------------------------------------------------------------------


@contextmanager
def _holding(dsn: str) -> Iterator[psycopg.Connection]:
    """A transaction that has looked, and stays open."""
    with psycopg.connect(dsn, application_name="report") as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM pg_class")
        yield holder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snapshot has been held for too long."""
    monkeypatch.setattr(_server, "_HELD_SECONDS", 0.0)
    monkeypatch.setattr(_server, "_HELD_TRANSACTIONS", 3)


def _snapshots(result: Result, *about: object) -> list[dict[str, str]]:
    """What is said of them; other tests' sessions hold some, too."""
    return [
        check
        for check in _all(result)
        if check["name"] == "snapshot" and all(str(word) in check["message"] for word in about)
    ]


def test_a_snapshot_that_is_held(run: Run, dsn: str, migrated: str, impatient: None) -> None:
    with _holding(dsn) as holder:
        pid = holder.info.backend_pid
        [check] = _snapshots(run("--json"), f"server process {pid} of {user_of(dsn)!r} (report, ")
        assert check["status"] == "warning"
        assert "idle in transaction" in check["message"]
        assert check["advice"].startswith(f"end it by pg_terminate_backend({pid})")
    assert _snapshots(run("--json"), pid) == []


def test_of_another_users_snapshot_only_the_age_in_transactions_is_seen(
    run: Run, roles: Roles, dsn: str, migrated: str, impatient: None
) -> None:
    name, viewer_dsn = roles.new("viewer")
    with _holding(dsn) as holder, psycopg.connect(dsn, autocommit=True) as busy:
        pid = holder.info.backend_pid
        for _ in range(5):
            busy.execute("SELECT pg_current_xact_id()")
        [check] = _snapshots(run("--json", dsn=viewer_dsn), f"server process {pid} of {user_of(dsn)!r}")
        assert "idle in transaction" not in check["message"]
        assert "keeps dead rows over " in check["message"]
        roles.as_admin(f'GRANT pg_read_all_stats TO "{name}"')
        [check] = _snapshots(run("--json", dsn=viewer_dsn), f"server process {pid}")
        assert "idle in transaction" in check["message"]


def test_a_role_that_does_not_see_all_is_told(run: Run, roles: Roles) -> None:
    name, dsn = roles.new("viewer")
    assert (
        f"other users' are hidden from {name!r} in part: GRANT pg_read_all_stats"
        in _checks(run("--json", dsn=dsn))["snapshot"][1]
    )


@pytest.fixture(scope="module")
def own_server() -> Iterator[PrivateServer]:
    """A server with prepared transactions and all kinds of replication slots, which few others have."""
    with PrivateServer(max_prepared_transactions=5, wal_level="logical") as server:
        yield server


def _spend_transactions(server: PrivateServer) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as db:
        for _ in range(5):
            db.execute("SELECT pg_current_xact_id()")


def test_a_prepared_transaction_that_holds_rows(run: Run, own_server: PrivateServer, impatient: None) -> None:
    with psycopg.connect(own_server.dsn, autocommit=True) as db:
        db.execute("BEGIN")
        db.execute("SELECT pg_current_xact_id()")
        db.execute("PREPARE TRANSACTION 'gid 7'")
        try:
            [check] = _snapshots(run("--json", dsn=own_server.dsn))
        finally:
            db.execute("ROLLBACK PREPARED 'gid 7'")
    assert check["status"] == "warning"
    assert re.fullmatch(r"transaction 'gid 7', prepared by 'fastq', keeps dead rows for \d+ s", check["message"])
    assert check["advice"] == "COMMIT PREPARED or ROLLBACK PREPARED 'gid 7', in this database"
    [check] = _snapshots(run("--json", dsn=own_server.dsn))
    assert check["status"] == "ok"


def test_a_replication_slot_that_holds_rows(run: Run, own_server: PrivateServer, impatient: None) -> None:
    with own_server.superuser() as db:

        def told() -> list[dict[str, str]]:
            _spend_transactions(own_server)
            return _snapshots(run("--json", dsn=own_server.dsn))

        # Neither keeps any of our rows: a logical one keeps rows of the catalogs alone, one that nobody has used yet none.
        db.execute("SELECT pg_create_logical_replication_slot('stream_1', 'pgoutput')")
        db.execute("SELECT pg_create_physical_replication_slot('standby_1', true)")
        try:
            found = db.execute("SELECT count(*) FROM pg_replication_slots WHERE catalog_xmin IS NOT NULL").fetchone()
            assert found == (1,)
            assert [check["status"] for check in told()] == ["ok"]
            held = "SELECT count(*) FROM pg_replication_slots WHERE xmin IS NOT NULL AND active"
            with Standby(own_server.superuser_dsn, "standby_1"):
                wait_until(lambda: db.execute(held).fetchone() == (1,))
                [check] = told()
                assert check["status"] == "warning"
                assert re.fullmatch(
                    r"replication slot 'standby_1' \(active\) keeps dead rows over \d+ transactions", check["message"]
                )
            wait_until(lambda: db.execute(held).fetchone() == (0,))
            [check] = told()
            assert check["message"].startswith("replication slot 'standby_1' (inactive) keeps dead rows over ")
            assert check["advice"] == (
                "its standby lags, or is gone: SELECT pg_drop_replication_slot('standby_1') if it is gone"
            )
        finally:
            db.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        assert [check["status"] for check in told()] == ["ok"]


def test_a_standby_that_holds_rows(run: Run, own_server: PrivateServer, impatient: None) -> None:
    sender = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walsender' AND backend_xmin IS NOT NULL"
    with own_server.superuser() as db, Standby(own_server.superuser_dsn):
        row = wait_until(lambda: db.execute(sender).fetchone())
        assert row is not None
        _spend_transactions(own_server)
        [check] = _snapshots(run("--json", dsn=own_server.superuser_dsn), f"server process {row[0]} of 'postgres'")
        assert check["status"] == "warning"
        assert re.search(r"keeps dead rows over \d+ transactions: a query on the standby", check["message"])
        assert check["advice"] == "end that query there, or switch hot_standby_feedback off"
        # Who may not see what it is takes it for a session.
        [check] = _snapshots(run("--json", dsn=own_server.dsn), f"server process {row[0]} of 'postgres'")
        assert "keeps dead rows over " in check["message"]
    wait_until(lambda: _snapshots(run("--json", dsn=own_server.dsn))[0]["status"] == "ok")


def test_few_connections_are_left(run: Run, roles: Roles, migrated: str) -> None:
    name, dsn = roles.new("worker")
    roles.as_admin(f'ALTER ROLE "{name}" CONNECTION LIMIT 4')
    result = run("--json", dsn=dsn)
    assert result.exit_code == 1
    assert _checks(result)["connections"] == (
        "problem",
        "1 of 4 in use, the limit of this role: a worker needs 3, a producer 2",
    )


# --- how it looks --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 200])
def test_in_a_terminal_lines_are_wrapped_beside_the_status(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)
    check = Check("claims", "problem", "held by the dead: [3 tasks] of process 7 " * 3, "start a worker " * 4)
    _print(console, check)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("problem  claims: held by the dead: ")
    assert all(line.startswith(" " * 9) for line in lines[1:])
    assert max(map(len, lines)) <= width
    assert "[3 tasks]" in console.file.getvalue()
    assert any(line.startswith(" " * 9 + "-> start") for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7201, "2 h"), (172_801, "2 d")],
)
def test_times_are_told_in_a_unit_of_their_size(seconds: float, text: str) -> None:
    assert span(seconds) == text
