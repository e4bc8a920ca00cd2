"""A schema that was dumped amid work and restored into a fresh server, whose transaction numbers are lower, just goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fastq import Consumer, Producer, Task, TaskInfo, migrate
from fastq.embedded import EmbeddedError, _programs
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.server import PrivateServer
from tests.support.lab import QUICK, Lab
from tests.support.waiting import wait_until


@cache
def _programs_for(version: int) -> Path | None:
    """The folder of a pg_dump, pg_restore and psql that are not older than a server of this version."""
    folders = [os.environ.get("FASTQ_TEST_PG_BIN"), f"/usr/lib/postgresql/{version}/bin"]
    if found := shutil.which("pg_dump"):
        folders.append(os.path.realpath(found).rpartition("/")[0])
    with contextlib.suppress(EmbeddedError):
        folders.append(str(_programs.find()))
    for folder in folders:
        if folder and all(os.access(Path(folder, name), os.X_OK) for name in ("pg_dump", "pg_restore", "psql")):
            said = subprocess.run([Path(folder, "pg_dump"), "--version"], check=True, capture_output=True, text=True)
            if int(said.stdout.split()[2].partition(".")[0]) >= version:
                return Path(folder)
    return None


def version_of(db: psycopg.Connection) -> int:
    return db.info.server_version // 10_000


class Dump:
    """A schema's dump, made by the role that owns it."""

    def __init__(self, programs: Path, dsn: str, schema: str, path: Path, *options: str) -> None:
        self._programs = programs
        self._path = path
        self._run("pg_dump", dsn, f"--schema={schema}", f"--file={path}", *options)

    def restore(self, dsn: str, *options: str) -> None:
        """By pg_restore; each complaint is an error."""
        self._run("pg_restore", dsn, "--exit-on-error", *options, str(self._path))

    def replay(self, dsn: str) -> None:
        """By psql; each complaint is an error."""
        self._run("psql", dsn, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--file={self._path}")

    def _run(self, name: str, dsn: str, *args: str) -> None:
        done = subprocess.run(
            [self._programs / name, f"--dbname={dsn}", *args], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def target() -> Iterator[PrivateServer]:
    """A fresh server: it has counted no transactions, and its sequences are not there."""
    with PrivateServer() as server:
        yield server


@pytest.fixture
def programs(db: psycopg.Connection, target: PrivateServer) -> Path:
    """Where a pg_dump and its kin are that fit both servers."""
    with psycopg.connect(target.dsn) as other:
        if version_of(other) < version_of(db):
            pytest.skip(
                "the private server is older than the session's, and a dump can't go back: see FASTQ_TEST_PG_BIN"
            )
    found = _programs_for(version_of(db))
    if found is None:
        pytest.skip("there is no pg_dump here that fits the server")
    return found


def restore_plain(dump: Dump, dsn: str, schema: str) -> None:
    dump.replay(dsn)


def restore_by_sections(dump: Dump, dsn: str, schema: str) -> None:
    for section in ("pre-data", "data", "post-data"):
        dump.restore(dsn, f"--section={section}", "--no-owner")


def restore_data_alone(dump: Dump, dsn: str, schema: str) -> None:
    """Into a schema that was migrated there: its first rows make room for the dump's."""
    migrate(dsn, schema=schema)
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute(sql.SQL("TRUNCATE {}, {}").format(*(sql.Identifier(schema, name) for name in ("leaf", "migration"))))
    dump.restore(dsn, "--data-only")


HOW = {
    "plain": (["--format=plain", "--no-owner"], restore_plain),
    "sections": (["--format=custom"], restore_by_sections),
    "data alone": (["--format=custom"], restore_data_alone),
}


def handle(task: TaskInfo) -> None:
    if task.payload == "fail":
        raise ValueError(task.payload)


@dataclass(frozen=True, slots=True)
class Before:
    """What was there when the dump was made, by the ids of the tasks."""

    running: list[int]
    """In a worker that lived, by its last heartbeat."""
    claimed: set[int]
    """By that worker, ahead."""
    completed: list[int]
    failed: int
    waiting: list[int]
    soon: int
    """Due a second later."""
    later: int
    token: int
    """Enqueued with the token a, and waiting."""


def work(lab: Lab, worker: WorkerProcess, helper: Consumer) -> Before:
    """Tasks of type t for the worker, which is to live on, and of type other for the helper; one or more in each state."""
    gate = lab.gate()
    others = lab.enqueue_others(*[None] * 50)
    failed = lab.producer.enqueue(Task("other", "fail", max_attempts=1)).id
    # Quick ones, so that the worker claims ahead.
    quick = lab.enqueue(count=300)
    lab.wait_for(completed=350, failed=1)
    helper.stop()
    held = set(lab.enqueue(*[gate.orders] * 100))
    wait_until(lambda: len(held & set(lab.journal.started())) == 3, message="three that run")
    running = sorted(held & set(lab.journal.started()))
    consumer = lab.consumer_id(pid=worker.pid)
    wait_until(lambda: lab.claimed(consumer) > set(running), message="tasks claimed ahead")
    found = Before(
        running=running,
        claimed=held.difference(running),
        completed=others + quick,
        failed=failed,
        waiting=lab.enqueue_others(*[None] * 1500),
        soon=lab.producer.enqueue(Task("other", delay=1)).id,
        later=lab.producer.enqueue(Task("other", delay=3600)).id,
        token=lab.producer.enqueue(Task("other", idempotency_token="a")).id,
    )
    lab.wait_for_beat(consumer, running=running)
    return found


def ids_of(lab: Lab) -> set[int]:
    return {id_ for (id_,) in lab.all("SELECT id FROM tasks")}


def check_that_work_goes_on(lab: Lab, before: Before, last_rid: int) -> None:
    # No id, no place in a queue and no token is given twice.
    old = ids_of(lab)
    new = lab.enqueue_others(*[None] * 1500)
    assert min(new) > max(old)
    assert lab.value("SELECT min(rid) FROM ready WHERE lo >= %s", min(new)) > last_rid
    again = lab.producer.enqueue(Task("other", idempotency_token="a"))
    assert (again.id, again.is_new) == (before.token, False)
    lanes = lab.value("SELECT max(id) FROM lane")
    lab.producer.enqueue(Task("a new type"))
    assert lab.value("SELECT max(id) FROM lane") > lanes
    # The consumers are only in the dump: their tasks are rescued and run; what was running is charged, once.
    lab.consumer(handle, type="other")
    lab.consumer(handle)
    once = {*before.claimed, *before.completed, *before.waiting, *new, before.soon, before.token}
    wanted = dict.fromkeys(before.running, 2) | dict.fromkeys(once, 1)
    wait_until(lambda: lab.completions() == wanted, timeout=QUICK["dead_after"] + 20)
    assert lab.losses() == dict.fromkeys(before.running, 1)
    states = dict(lab.all("SELECT id, state FROM tasks WHERE id IN (%s, %s)", before.failed, before.later))
    assert states == {before.failed: "failed", before.later: "pending"}


@pytest.mark.parametrize("how", HOW)
def test_work_goes_on_after_a_restore(
    programs: Path, target: PrivateServer, dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path, how: str
) -> None:
    options, restore = HOW[how]
    with psycopg.connect(dsn, autocommit=True) as busy:
        for _ in range(3000):
            busy.execute("SELECT pg_current_xact_id()")
    (tmp_path / "first").mkdir()
    with Lab(dsn, migrated, db, tmp_path / "first") as lab:
        before = work(lab, lab.worker(concurrency=3), lab.consumer(handle, type="other"))
        number = lab.value("SELECT pg_current_xact_id()::text::bigint")
        dump = Dump(programs, dsn, migrated, tmp_path / "dump", *options)
        ids, last_rid = ids_of(lab), lab.value("SELECT max(rid) FROM ready")
    restore(dump, target.dsn, migrated)
    (tmp_path / "second").mkdir()
    with psycopg.connect(target.dsn, autocommit=True) as there:
        there.execute("SELECT pg_catalog.set_config('search_path', %s, false)", [migrated])
        with Lab(target.dsn, migrated, there, tmp_path / "second") as lab:
            assert lab.value("SELECT pg_current_xact_id()::text::bigint") < number
            assert ids_of(lab) == ids
            check_that_work_goes_on(lab, before, last_rid)


def test_nothing_of_a_servers_own_numbers_is_stored(migrated: str, db: psycopg.Connection) -> None:
    """A transaction's number, a snapshot, a place in the log or in a file means something else, or nothing, after a restore."""
    rows = db.execute(
        "SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "WHERE c.relnamespace = %s::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.attnum > 0 "
        "AND a.atttypid IN ('xid'::regtype, 'xid8'::regtype, 'cid'::regtype, 'tid'::regtype, 'oid'::regtype, "
        "'pg_snapshot'::regtype, 'txid_snapshot'::regtype, 'pg_lsn'::regtype)",
        [f'"{migrated}"'],
    ).fetchall()
    assert rows == []


def test_the_grants_come_along(programs: Path, target: PrivateServer, dsn: str, migrated: str, tmp_path: Path) -> None:
    """The roles themselves don't: without them, a dump is restored with --no-privileges, and the rights are granted again."""
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO PUBLIC").format(sql.Identifier(migrated)))
    dump = Dump(programs, dsn, migrated, tmp_path / "dump", "--format=custom")
    dump.restore(target.dsn, "--no-owner")
    with psycopg.connect(target.dsn) as db:
        acl = "SELECT nspacl::text LIKE %s FROM pg_namespace WHERE nspname = %s"
        assert db.execute(acl, ["%,=U/%", migrated]).fetchone() == (True,)
    with Producer(target.dsn, schema=migrated) as producer:
        assert producer.enqueue(Task("t")).is_new
