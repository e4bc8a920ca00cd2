"""The rules that hold for any layout, proved on whole engines: fencing, charges, liveness, durability, notifications."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Producer, Task, TaskInfo
from fastq._engine import render
from tests.support.lab import Lab, Runs
from tests.support.waiting import until_the_next_notification, wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


# --- rule 1: fencing -------------------------------------------------------------------------------


class _Stale(Runs):
    """Its held task ends badly, if it is told so."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self._raises = raises

    def __call__(self, task: TaskInfo) -> None:
        super().__call__(task)
        if self._raises and task.payload == "hold":
            raise ValueError("too late")


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_rule_1_a_late_result_of_a_worker_declared_dead_is_refused(
    lab: Lab, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    stale, fresh = _Stale(raises=raises), Runs()
    fresh.release.set()
    first = lab.consumer(stale, concurrency=1)
    warm_up = lab.enqueue(count=200)
    lab.wait_for(completed=200)
    [held, *waiting] = lab.enqueue("hold", *(None for _ in range(5)))
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=[held])
    wait_until(lambda: lab.claimed(me) == {held, *waiting})
    lab.declare_dead(me)
    again = lab.consumer_id(other_than=[me])
    second = lab.consumer(fresh)
    lab.wait_for(completed=206)
    assert sorted(fresh.ids) == sorted([held, *waiting])
    second.stop()
    # Only now does the first run of it end.
    stale.release.set()
    wait_until(lambda: first.stats()["refused"])
    wait_until(lambda: f"1 results were refused: the tasks are no longer ours (ids {held})" in caplog.text)
    [last] = lab.enqueue(None)
    lab.wait_for(completed=207)
    assert stale.ids == [*sorted(warm_up), held, last]
    assert lab.value("SELECT consumer FROM done WHERE ids @> %s::bigint", last) == again
    # The run that the rescuer took away is charged, and no other; what came of it in the end is nowhere.
    assert lab.completions() == dict.fromkeys([*warm_up, *waiting, last], 1) | {held: 2}
    assert lab.all("SELECT id, left(error, 19) FROM attempt_error") == [(held, "the worker was lost")]
    counted = {name: first.stats()[name] for name in ("completed", "retried", "failed", "refused")}
    assert counted == {"completed": 201, "retried": 0, "failed": 0, "refused": 1}


# --- rule 2: who is charged ------------------------------------------------------------------------


def test_rule_2_a_killed_worker_is_charged_for_what_ran_and_not_for_what_it_held(lab: Lab) -> None:
    gate = lab.gate()
    worker = lab.worker(concurrency=3)
    lab.enqueue(count=200)
    lab.wait_for(completed=200)
    running = lab.enqueue(*(gate.orders for _ in range(3)))
    me = lab.consumer_id(pid=worker.pid)
    lab.wait_for_beat(me, running=running)
    waiting = lab.enqueue(count=60)
    wait_until(lambda: lab.claimed(me) > {*running}, message="some that are held and not started")
    worker.kill()
    gate.open()
    runs = Runs()
    lab.consumer(runs)
    lab.wait_for(completed=263)
    assert sorted(runs.started) == sorted([(id_, 2) for id_ in running] + [(id_, 1) for id_ in waiting])
    assert lab.losses() == dict.fromkeys(running, 1)
    assert lab.value("SELECT count(*) FROM attempt_error") == 3


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_rule_2_a_task_that_kills_its_process_fails_and_its_neighbours_complete(lab: Lab, max_attempts: int) -> None:
    payloads = [None] * 51
    payloads[20] = {"kill": "signal"}  # type: ignore[call-overload]
    ids = lab.enqueue(*payloads, max_attempts=max_attempts) if max_attempts > 1 else []
    if not ids:
        # Of innocents that may be tried once only, one beside the killer may end with it: a started run is a counted run.
        before, killer, after = (
            lab.enqueue(count=20),
            lab.enqueue({"kill": "signal"}, max_attempts=1),
            lab.enqueue(count=30),
        )
        ids = before + killer + after
    killer_id, innocents = ids[20], {*ids[:20], *ids[21:]}
    workers = 0
    while lab.value("SELECT count(*) FROM tasks WHERE state IN ('completed', 'failed')") < len(ids):
        workers += 1
        assert workers <= max_attempts + 2
        worker = lab.worker(concurrency=4)
        wait_until(
            lambda worker=worker: (
                worker.is_dead  # type: ignore[misc]
                or lab.value("SELECT count(*) FROM tasks WHERE state IN ('completed', 'failed')") == len(ids)
            ),
            timeout=20,
            message="the end of the worker, or of all tasks",
        )
    starts = lab.journal.started()
    assert max_attempts <= starts.count(killer_id) <= max_attempts + 1
    assert lab.all("SELECT id, state, attempts FROM dead") == [(killer_id, "failed", max_attempts)]
    assert lab.completions().keys() == innocents
    # What ran beside the killer, or was claimed with it to run at once, may be charged, but once; then it runs alone.
    losses = lab.losses()
    assert losses.pop(killer_id) == max_attempts
    assert set(losses.values()) <= {1}
    assert sum(starts.count(id_) < 2 for id_ in losses) <= 3


def test_rule_2_what_ran_alone_is_stored_before_the_next_starts(lab: Lab) -> None:
    innocent, killer = lab.enqueue(None, {"kill": "signal"}, max_attempts=2)
    # As after losses that left each of them one attempt.
    lab.db.execute("UPDATE ready SET track = 3, attempts = 1")
    links = lab.links()
    links.hold_requests("complete")
    worker = lab.worker(dsn=links.dsn)
    me = lab.consumer_id(pid=worker.pid)
    wait_until(lambda: worker.is_dead or links.held("complete"), message="the first result on its way")
    assert lab.journal.started()[0] == innocent
    # Three heartbeats are time enough for the killer, if it did not wait for the first one's result to be stored.
    for _ in range(0 if worker.is_dead else 3):
        seen = lab.value("SELECT beat_at FROM consumer WHERE id = %s", me)
        wait_until(
            lambda seen=seen: (
                worker.is_dead  # type: ignore[misc]
                or lab.value("SELECT beat_at FROM consumer WHERE id = %s", me) > seen
            )
        )
    links.flow()
    wait_until(lambda: worker.is_dead)
    lab.consumer()
    lab.wait_for(completed=1, failed=1)
    assert lab.completions() == {innocent: 2}
    assert lab.losses() == {killer: 1}


# --- rule 3: liveness by heartbeat -----------------------------------------------------------------


def test_rule_3_a_handler_that_keeps_the_interpreters_lock_keeps_its_task(lab: Lab) -> None:
    # What a busy machine may hold up is not what is looked at: a heartbeat, and a tick that keeps the lead.
    lab.consumer(lease=60, dead_after=3)
    leader = lab.consumer_id()
    lab.wait_until_leads(id_=leader)
    worker = lab.worker(dead_after=3)
    me = lab.consumer_id(pid=worker.pid)
    # Longer than the dead time by far, with no moment in which Python could do anything.
    [id_] = lab.enqueue({"hold_lock_ms": 7000})
    wait_until(lambda: lab.journal.started() == [id_])
    beats = []
    while not lab.journal.entries("end"):
        beats.append(lab.value("SELECT beat_at FROM consumer WHERE id = %s AND dead_at IS NULL", me))
        time.sleep(0.02)
    assert None not in beats
    assert len(set(beats)) >= 8
    lab.wait_for(completed=1)
    assert lab.completions() == {id_: 1}
    assert lab.journal.started() == [id_]
    assert lab.value("SELECT holder FROM leader") == leader


# --- rule 5: durability ----------------------------------------------------------------------------


def test_rule_5_results_are_durable_and_claims_and_heartbeats_are_not_waited_for(lab: Lab) -> None:
    lab.db.execute("CREATE TABLE seen (what text, setting text, PRIMARY KEY (what, setting))")
    lab.db.execute("""
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            EXECUTE format('INSERT INTO %I.seen VALUES ($1, $2) ON CONFLICT DO NOTHING', tg_table_schema)
              USING tg_argv[0], current_setting('synchronous_commit');
            RETURN NULL;
        END $$""")
    for table in ("claim", "done_00", "attempt_error", "dead"):
        lab.db.execute(
            psycopg.sql.SQL("CREATE TRIGGER see AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION see({})").format(
                psycopg.sql.Identifier(table), table
            )
        )
    lab.db.execute("CREATE TRIGGER see AFTER UPDATE ON consumer FOR EACH ROW EXECUTE FUNCTION see('heartbeat')")

    def handle(task: TaskInfo) -> None:
        if task.payload == "bad":
            raise ValueError

    # A role or database whose default is `off` changes nothing.
    dsn = psycopg.conninfo.make_conninfo(lab.dsn, options="-c synchronous_commit=off")
    lab.consumer(handle, dsn=dsn)
    lab.enqueue(None, None, "bad", max_attempts=1)
    lab.wait_for(completed=2, failed=1)
    wait_until(lambda: lab.value("SELECT count(*) FROM seen WHERE what = 'heartbeat'"))
    seen = lab.all("SELECT what, setting FROM seen ORDER BY what")
    durable = [(table, "on") for table in ("attempt_error", "dead", "done_00")]
    assert seen == sorted([*durable, ("claim", "off"), ("heartbeat", "off")])


@pytest.mark.parametrize("kind", ["first", "beside a notification", "several", "delayed", "token", "bulk"])
def test_rule_5_an_enqueue_is_on_disk_when_it_returns(lab: Lab, kind: str) -> None:
    """A role or database whose default is `off` changes nothing. The server's own writer would need up to 200 ms."""
    dsn = psycopg.conninfo.make_conninfo(lab.dsn, options="-c synchronous_commit=off")
    with Producer(dsn, schema=lab.schema) as producer:
        producer.enqueue(Task("t"))
        for n in range(10):
            if kind == "beside a notification":
                producer.enqueue(Task("t"))
            else:
                until_the_next_notification()
            before = lab.value("SELECT pg_current_wal_insert_lsn()")
            if kind in ("several", "bulk"):
                producer.enqueue_many(Task("t", n) for n in range(3 if kind == "several" else 1_000))
            else:
                producer.enqueue(
                    Task(
                        "t",
                        delay=60 if kind == "delayed" else None,
                        idempotency_token=f"{n}" if kind == "token" else None,
                    )
                )
            after = lab.value("SELECT pg_current_wal_flush_lsn()")
            assert lab.value("SELECT pg_wal_lsn_diff(%s, %s) > 0", after, before)


# --- rule 9: notifications -------------------------------------------------------------------------


def test_rule_9_a_notification_wakes_a_consumer_and_again_after_its_connection_was_lost(lab: Lab) -> None:
    links = lab.links()
    consumer = lab.consumer(Runs(), dsn=links.dsn, poll_interval=60)
    for count in (1, 2):
        lab.enqueue(None)
        wait_until(lambda count=count: consumer.stats()["completed"] == count)  # type: ignore[misc]
    links.requests["control"] = b""
    assert links.cut("control") == 1
    wait_until(lambda: b"LISTEN" in links.requests["control"])
    lab.enqueue(None)
    wait_until(lambda: consumer.stats()["completed"] == 3)


def test_rule_9_what_is_enqueued_while_nobody_listens_is_found_by_polling(lab: Lab) -> None:
    links = lab.links()
    consumer = lab.consumer(Runs(), dsn=links.dsn, poll_interval=0.5, dead_after=60)
    lab.enqueue(None)
    lab.wait_for(completed=1)
    links.hold_answers("control")
    links.wait_for_answer("control")
    lab.enqueue(None)
    wait_until(lambda: consumer.stats()["completed"] == 2)


def test_rule_9_polling_alone_works_without_any_session_state_of_listening(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, listen=False)
    ids = lab.enqueue(count=3) + lab.enqueue(None, delay=0.1)
    lab.wait_for(completed=4)
    assert sorted(runs.ids) == sorted(ids)
    consumer.stop()
    assert b"SELECT" in links.requests["control"]
    assert b"LISTEN" not in b"".join(links.requests.values())


# --- rule 10: several schemas are apart ------------------------------------------------------------


def test_rule_10_no_statement_of_a_worker_needs_ddl_or_a_session_level_lock(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    with caplog.at_level(logging.WARNING, logger="fastq"), contextlib.ExitStack() as stack:
        consumer = lab.consumer(Runs(), dsn=links.dsn, completed_retention=0.5)
        stack.callback(consumer.stop)
        lab.enqueue(count=100)
        lab.enqueue(None, delay=0.1)
        wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0)
    sent = b"".join(links.requests.values()).upper()
    assert render("fastq.", lab.schema).encode().upper() in sent
    for word in (b"ADVISORY", b"CREATE ", b"ALTER ", b"DROP ", b"DETACH"):
        assert word not in sent
