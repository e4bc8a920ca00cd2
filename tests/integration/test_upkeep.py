"""Upkeep on whole engines: who leads, what happens when the leader goes or comes back, promotion in time, retention."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fastq import ConstantBackoff, Producer, Task, TaskInfo
from tests.support.consuming import states
from tests.support.lab import Lab, Runs
from tests.support.storage import Session, Worker, add_lane, enqueue
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@contextlib.contextmanager
def _locked(lab: Lab, ids: list[int]) -> Iterator[None]:
    """Delayed tasks that nobody can promote as long as this lasts."""
    with psycopg.connect(lab.dsn) as connection:
        connection.execute("SELECT set_config('search_path', %s, false)", [lab.schema])
        locked = connection.execute("SELECT 1 FROM delayed WHERE id = ANY (%s) FOR UPDATE", [ids])
        assert locked.rowcount == len(ids)
        yield


# --- the leader ------------------------------------------------------------------------------------


def test_a_leader_that_stood_still_past_its_lease_and_goes_on_does_no_harm(lab: Lab) -> None:
    worker = lab.worker()
    lab.wait_until_leads(pid=worker.pid)
    ids = lab.enqueue(count=100, delay=2)
    with _locked(lab, ids):
        wait_until(lambda: lab.value("SELECT max(run_at) < clock_timestamp() FROM delayed"))
        # It has seen that they are due, and what it would do about it was decided under its old term.
        worker.freeze()
        term = lab.value("SELECT term FROM leader")
        runs = Runs()
        # It keeps its lease however late its tick is: each time that one runs out is a term.
        lab.consumer(runs, lease=60)
        me = lab.consumer_id(other_than=lab.ids_of(worker.pid))
        lab.wait_until_leads(id_=me)
        worker.thaw()
        wait_until(lambda: "leads no more" in worker.log)
    lab.wait_for(completed=100)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert sorted(runs.ids + lab.journal.started()) == ids
    assert lab.all("SELECT holder, term FROM leader") == [(me, term + 1)]


def test_a_leader_that_hears_late_that_it_no_longer_leads_does_no_harm(lab: Lab) -> None:
    links = lab.links()
    first, second = Runs(), Runs()
    lab.consumer(first, dsn=links.dsn, dead_after=60)
    old = lab.consumer_id()
    lab.wait_until_leads(id_=old)
    ids = lab.enqueue(count=100, delay=0.5)
    with _locked(lab, ids):
        wait_until(lambda: lab.value("SELECT max(run_at) < clock_timestamp() FROM delayed"))
        # Its next answer says that it leads and that tasks are due; it gets it when another leads.
        links.hold_answers("control")
        links.wait_for_answer("control")
        lab.consumer(second, dead_after=60)
        lab.wait_until_leads(id_=lab.consumer_id(other_than=[old]))
        links.flow()
    lab.wait_for(completed=100)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert sorted(first.ids + second.ids) == ids
    lab.wait_for_beat(old)


def test_a_leaders_death_lets_another_lead_and_promote_in_time(lab: Lab) -> None:
    worker = lab.worker()
    lab.wait_until_leads(pid=worker.pid)
    runs = Runs()
    lab.consumer(runs)
    [id_] = lab.enqueue(None, delay=2.5)
    run_at = lab.value("SELECT run_at FROM delayed")
    worker.kill()
    lab.wait_for(completed=1)
    assert runs.ids == [id_]
    assert 0 <= lab.value("SELECT extract(epoch FROM done_at - %s)::float FROM done", run_at) < 5


def test_a_leaders_death_lets_another_lead_within_lease_and_tick(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    worker = lab.worker(lease=1.5)
    lab.wait_until_leads(pid=worker.pid)
    with caplog.at_level(logging.INFO, logger="fastq.leader"):
        # Its own is not renewed for 20 s: it still says when it was taken.
        lab.consumer(Runs(), lease=60)
        me = lab.consumer_id(other_than=lab.ids_of(worker.pid))
        worker.kill()
        killed_at = lab.value("SELECT clock_timestamp()")
        lab.wait_until_leads(id_=me)
        took_over_at = lab.value("SELECT expires_at - interval '60 seconds' FROM leader")
        # Its lease, a tick of one that doesn't lead, and this machine's hiccups.
        assert (took_over_at - killed_at).total_seconds() < 1.5 + 1.0 + 5.5
        lab.wait_for_beat(me)
        wait_until(lambda: "leads from here on (term 2)" in caplog.text)
    assert caplog.text.count("leads from here on") == 1


def test_a_leader_that_leaves_lets_another_lead_at_once(lab: Lab) -> None:
    # A lease that would otherwise last for minutes.
    first = lab.consumer(lease=600)
    old = lab.consumer_id()
    lab.wait_until_leads(id_=old)
    lab.consumer(lease=600)
    new = lab.consumer_id(other_than=[old])
    first.stop()
    lab.wait_until_leads(id_=new)
    assert lab.value("SELECT term FROM leader") == 2


def test_all_workers_die_with_tasks_running_and_the_next_one_does_it_all(lab: Lab) -> None:
    gate = lab.gate()
    workers = [lab.worker(concurrency=5) for _ in range(2)]
    ids = lab.enqueue(*[gate.orders] * 10)
    wait_until(lambda: sorted(lab.journal.started()) == ids)
    for worker in workers:
        for me in lab.ids_of(worker.pid):
            lab.wait_for_beat(me, running=lab.journal.started(pid=worker.pid))
    for worker in workers:
        worker.kill()
    gate.open()
    runs = Runs()
    lab.consumer(runs)
    lab.wait_for(completed=10)
    assert sorted(runs.started) == [(id_, 2) for id_ in ids]
    assert lab.losses() == dict.fromkeys(ids, 1)
    wait_until(lambda: lab.value("SELECT count(*) FROM consumer") == 1, message="the dead ones forgotten")


def test_a_leader_that_was_cut_off_declares_nobody_dead_when_it_is_back(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    lab.consumer(dsn=links.dsn, statement_timeout=60)
    leader = lab.consumer_id()
    lab.wait_until_leads(id_=leader)
    lab.enqueue("hold")
    lab.consumer(runs, dsn=links.dsn, statement_timeout=60)
    other = lab.consumer_id(other_than=[leader])
    lab.wait_for_beat(other, running=wait_until(lambda: runs.ids))
    # Both are silent; and the leader hears of its own silence first, if it wants to.
    links.hold_requests("control")
    wait_until(
        lambda: lab.value("SELECT bool_and(beat_at < clock_timestamp() - interval '2500 milliseconds') FROM consumer"),
        message="the dead time, twice and more",
    )
    links.flow()
    lab.wait_for_beat(other, running=runs.ids)
    wait_until(lambda: lab.value("SELECT bool_and(beat_at > clock_timestamp() - interval '1 second') FROM consumer"))
    runs.release.set()
    lab.wait_for(completed=1)
    assert lab.all("SELECT id FROM consumer ORDER BY id") == [(id_,) for id_ in sorted([leader, other])]
    assert len(runs.ids) == 1


# --- promotion -------------------------------------------------------------------------------------


def test_delayed_tasks_start_within_a_second_of_their_time_also_in_workers_that_do_not_lead(lab: Lab) -> None:
    lab.consumer()
    lab.wait_until_leads(id_=lab.consumer_id())
    runs = Runs()
    lab.consumer(runs, poll_interval=60)
    for delay in (0.3, 0.9, 1.0, 1.7, 2.4):
        lab.enqueue(count=20, delay=delay)
    due = dict(lab.all("SELECT id, run_at FROM delayed"))
    lab.wait_for(completed=100)
    rows = lab.all("SELECT i, done_at FROM done, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i")
    late = [(done_at - due[id_]).total_seconds() for id_, done_at in rows]
    assert len(late) == 100
    assert min(late) >= 0
    assert max(late) < 5
    assert sorted(runs.started) == [(id_, 1) for id_ in sorted(due)]


# --- retention -------------------------------------------------------------------------------------


class _FailsFirst(Runs):
    """The first attempt of a task with the payload ``"fail"`` fails."""

    def __call__(self, task: TaskInfo) -> None:
        super().__call__(task)
        if task.payload == "fail" and task.attempt == 1:
            raise ValueError


def test_completed_tasks_go_with_their_leaves_and_what_waits_survives(lab: Lab) -> None:
    runs = _FailsFirst()
    lab.consumer(runs, completed_retention=0.5, retry_policy=ConstantBackoff(600.0))
    # All in the same leaf: one that runs, one that waits for its retry, and those whose consumer comes later.
    held, failed = lab.enqueue("hold", "fail")
    [scheduled] = lab.enqueue("later", delay=600)
    waiting = lab.enqueue_others(*range(700))
    leaf = lab.value("SELECT DISTINCT leaf FROM ready")
    wait_until(lambda: lab.value("SELECT leaf FROM delayed WHERE id = %s", failed) == leaf)
    wait_until(lambda: lab.value("SELECT no FROM leaf WHERE state = 'open'") != leaf, message="the next leaf")
    # A producer of its own: the first one goes on writing to the leaf that it knows, which does no harm.
    with Producer(lab.dsn, schema=lab.schema) as producer:
        gone = [result.id for result in producer.enqueue_many(Task("t") for _ in range(1000))]
    wait_until(lambda: set(gone) <= set(runs.ids), message="the end of all that are to go")
    wait_until(lambda: lab.value("SELECT bool_and(leaf IS NULL) FROM delayed"), message="the retry with its content")
    wait_until(lambda: lab.value("SELECT bool_and(leaf <> %s) FROM ready", leaf), message="the waiting ones moved")
    wait_until(lambda: states(lab.db) == {"running": 1, "pending": 702}, message="the end of all that was completed")
    assert lab.value("SELECT leaf FROM claim") == leaf
    lab.db.execute("UPDATE delayed SET run_at = clock_timestamp()")
    others: dict[int, int] = {}
    lab.consumer(lambda task: others.update({task.id: task.payload}), type="other", completed_retention=0.5)
    wait_until(lambda: others == dict(zip(waiting, range(700), strict=True)), message="the waiting ones, as enqueued")
    wait_until(lambda: {(failed, 2), (scheduled, 1)} <= set(runs.started), message="the delayed ones")
    runs.release.set()
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0, message="all leaves empty")
    assert sorted(runs.started) == sorted(
        [(held, 1), (failed, 1), (failed, 2), (scheduled, 1)] + [(id_, 1) for id_ in gone]
    )
    assert states(lab.db) == {}


def test_failed_tasks_and_their_errors_are_forgotten_after_their_own_retention(lab: Lab) -> None:
    def handle(task: TaskInfo) -> None:
        raise ValueError

    consumer = lab.consumer(handle, completed_retention=0.5, failed_retention=600)
    lab.enqueue(count=50, max_attempts=1)
    lab.wait_for(failed=50)
    # Their leaf goes, and they stay: they carry what they need.
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0)
    assert states(lab.db) == {"failed": 50}
    assert lab.value("SELECT count(*) FROM attempt_error") == 50
    consumer.stop()
    lab.consumer(completed_retention=0.5, failed_retention=0.5)
    wait_until(lambda: lab.value("SELECT count(*) FROM dead") == 0)
    wait_until(lambda: lab.value("SELECT count(*) FROM attempt_error") == 0)


def test_retention_goes_on_beside_an_open_transaction_that_reads_a_leaf(lab: Lab) -> None:
    runs = Runs()
    lab.enqueue(count=10)
    with psycopg.connect(lab.dsn) as reader:
        reader.execute("SELECT set_config('search_path', %s, false)", [lab.schema])
        assert reader.execute("SELECT count(*) FROM task_00").fetchone() == (10,)
        lab.consumer(runs, completed_retention=0.5)
        wait_until(lambda: lab.value("SELECT no FROM leaf WHERE state = 'open'") >= 2)
        # Work goes on meanwhile, and nobody waits for the reader.
        for _ in range(5):
            [id_] = lab.enqueue(None)
            wait_until(lambda id_=id_: id_ in runs.ids)  # type: ignore[misc]
        assert lab.value("SELECT count(*) FROM task_00") >= 10
    wait_until(lambda: lab.value("SELECT count(*) FROM task_00") == 0)


def test_nobody_waits_for_a_reader_behind_the_emptying_of_its_leaf(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Emptying gives up and comes back, as long as a transaction is open that has read the leaf. PostgreSQL itself is asked whether a
    claim or an enqueue waited: their sessions give up a lock that takes too long."""
    caplog.set_level(logging.DEBUG, "fastq")
    lab.db.execute("CREATE TABLE seen (lock_timeout text)")
    lab.db.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO seen VALUES (current_setting('lock_timeout')); RETURN NULL; END$$"
    )
    lab.db.execute("CREATE TRIGGER note BEFORE TRUNCATE ON task_00 EXECUTE FUNCTION note()")
    lab.db.execute(sql.SQL("ALTER FUNCTION note() SET search_path = {}").format(sql.Identifier(lab.schema)))
    runs = Runs()
    lab.enqueue(count=10)
    claimer, producer = Session(lab.dsn, lab.schema), Session(lab.dsn, lab.schema)
    for session in (claimer, producer):
        session.sql("SET lock_timeout = '1s'")
    worker = Worker(claimer, 1)
    lane = add_lane(producer, "by hand")
    over = threading.Event()

    def claim() -> list[int]:
        """All that is enqueued by hand, in a loop without a pause."""
        ids: list[int] = []
        while not over.is_set():
            worker.beat()
            for chunk in worker.claim(lanes=[lane]):
                ids += chunk.ids or []
                worker.complete({chunk.no: chunk.ids or []})
        return ids

    def produce() -> list[int]:
        ids: list[int] = []
        while not over.is_set():
            [(first, _, leaf)] = producer.run("reserve_ids", 1)
            ids += enqueue(producer, 1, lane=lane, leaf=leaf, first=first)
        return ids

    with ThreadPoolExecutor(2) as pool, psycopg.connect(lab.dsn) as reader:
        reader.execute("SELECT set_config('search_path', %s, false)", [lab.schema])
        assert reader.execute("SELECT count(*) FROM task_00").fetchone() == (10,)
        claims, enqueues = pool.submit(claim), pool.submit(produce)
        try:
            lab.consumer(runs, completed_retention=0.5)
            wait_until(
                lambda: caplog.text.count("leaf 0 is in use") >= 3 or claims.done() or enqueues.done(), timeout=60
            )
        finally:
            over.set()
        # Neither was cancelled for want of a lock.
        assert set(claims.result(30)) <= set(enqueues.result(30))
        assert lab.value("SELECT count(*) FROM seen") == 0
        assert lab.value("SELECT count(*) FROM task_00") >= 10
    wait_until(lambda: lab.value("SELECT count(*) FROM task_00") == 0)
    # What the others could have waited for, behind it.
    assert lab.all("SELECT DISTINCT lock_timeout FROM seen") == [("50ms",)]
    claimer.close()
    producer.close()


def test_a_right_that_is_missing_stops_retention_and_nothing_else(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """As a role that may not TRUNCATE; here a trigger refuses it."""
    lab.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'not yours'; END$$"
    )
    lab.db.execute("CREATE TRIGGER refuse BEFORE TRUNCATE ON task_00 EXECUTE FUNCTION refuse()")
    gate = lab.gate()
    worker = lab.worker(completed_retention=0.5)
    lab.wait_until_leads(pid=worker.pid)
    runs = Runs()
    lab.consumer(runs, completed_retention=0.5)
    lab.enqueue(None)
    wait_until(lambda: "not yours" in worker.log)
    [held] = lab.enqueue(gate.orders)
    wait_until(lambda: held in [*runs.ids, *lab.journal.started()])
    worker.kill()
    lab.enqueue(None, delay=0.1)
    gate.open()
    wait_until(lambda: lab.value("SELECT count(*) FROM tasks WHERE state IN ('pending', 'running')") == 0)
    wait_until(lambda: "not yours" in caplog.text)
