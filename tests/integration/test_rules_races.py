"""Races, each forced to happen: lost answers, results in doubt, workers that stand still past their death, and stops."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import TaskInfo
from tests.support.consuming import start_python, states
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


# --- claims ----------------------------------------------------------------------------------------


def test_a_claim_whose_answer_is_lost_is_given_back_by_the_heartbeat_and_runs_once(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn)
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    links.hold_answers("claim")
    ids = lab.enqueue(count=20)
    wait_until(lambda: len(lab.claimed(me)) == 20)
    lab.wait_for_beat(me)
    # The call is still waiting for its answer: no heartbeat takes the claim for lost.
    assert "gives back" not in caplog.text
    links.cut("claim")
    lab.wait_for(completed=21)
    wait_until(lambda: "gives back 1 claims whose answers were lost" in caplog.text)
    assert sorted(runs.started) == [(id_, 1) for id_ in [first, *ids]]
    assert consumer.stats()["refused"] == 0
    assert lab.value("SELECT count(*) FROM claim") == 0


def test_a_lost_claim_with_a_task_that_can_not_be_given_back_stops_no_upkeep_and_no_neighbour(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    links.hold_answers("claim")
    ids = lab.enqueue(count=20)
    wait_until(lambda: len(lab.claimed(me)) == 20)
    lab.refuse("ready", "NEW.lo <= {0} AND NEW.hi >= {0}", ids[7])
    links.cut("claim")
    lab.wait_for(completed=20, running=1)
    assert sorted(runs.ids[1:]) == [id_ for id_ in ids if id_ != ids[7]]
    lab.enqueue(None, delay=0.1)
    lab.wait_for(completed=21, running=1)
    lab.wait_for_beat(me)
    said = [
        record for record in caplog.records if f"the result of task {ids[7]} can't be stored" in record.getMessage()
    ]
    assert [record.levelname for record in said] == ["ERROR"]
    assert consumer.stats()["refused"] == 0
    # It is not lost: who leaves leaves it to others.
    consumer.stop()
    lab.db.execute("DROP TRIGGER refuse ON ready")
    others = Runs()
    lab.consumer(others)
    lab.wait_for(completed=22)
    assert others.ids == [ids[7]]


def test_what_is_claimed_while_its_worker_is_declared_dead_is_rescued_and_runs_once(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    lab.consumer(runs, dsn=links.dsn, dead_after=60)
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    links.hold_requests("claim")
    ids = lab.enqueue(count=20)
    links.wait_for_request("claim")
    lab.declare_dead(me)
    lab.consumer_id(other_than=[me])
    # The claim arrives in the name of the dead.
    links.flow("claim")
    lab.wait_for(completed=21)
    assert sorted(runs.started) == [(id_, 1) for id_ in [first, *ids]]
    assert lab.losses().total() == 0
    wait_until(lambda: lab.value("SELECT count(*) FROM consumer") == 1, message="the dead one forgotten")


def test_what_a_dead_name_claimed_and_gets_while_its_worker_registers_anew_is_left_to_others(lab: Lab) -> None:
    """The new registration allows starts again: what comes in just before it, in the name of the dead, must not be among them."""
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    # A registration waits for us.
    lab.db.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN PERFORM pg_advisory_xact_lock(hashtext(TG_TABLE_SCHEMA)); RETURN NEW; END$$"
    )
    lab.db.execute("CREATE TRIGGER wait BEFORE INSERT ON consumer FOR EACH ROW EXECUTE FUNCTION wait()")
    lab.db.execute("SELECT pg_advisory_lock(hashtext(%s))", [lab.schema])
    links.hold_answers("claim")
    ids = lab.enqueue(count=20)
    wait_until(lambda: len(lab.claimed(me)) == 20)
    links.wait_for_answer("claim")
    assert lab.all("DELETE FROM consumer WHERE id = %s RETURNING id", me)
    wait_until(
        lambda: (
            lab.value(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            == 1
        ),
        message="its new registration under way",
    )
    links.flow("claim")
    wait_until(lambda: consumer.stats()["claimed"] == 21)
    assert lab.value("SELECT count(*) FROM consumer") == 0, "the answer came before the registration"
    lab.db.execute("SELECT pg_advisory_unlock(hashtext(%s))", [lab.schema])
    again = lab.consumer_id(other_than=[me])
    lab.wait_for(completed=21)
    assert sorted(runs.started) == [(id_, 1) for id_ in [first, *ids]]
    names = {
        consumer for (consumer,) in lab.all("SELECT DISTINCT consumer FROM done WHERE NOT ids @> %s::bigint", first)
    }
    assert names == {again}
    assert consumer.stats()["refused"] == 0


# --- results in doubt ------------------------------------------------------------------------------


class _Ends(Runs):
    """A task fails after it was held, where it is told so."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self._raises = raises

    def __call__(self, task: TaskInfo) -> None:
        super().__call__(task)
        if self._raises and task.payload == "hold":
            raise ValueError("no")


@pytest.mark.parametrize("raises", [False, True], ids=["completed", "failed"])
@pytest.mark.parametrize("lost", ["request", "answer", "answer and look-up"])
def test_a_result_in_doubt_counts_once_and_nothing_runs_twice(
    lab: Lab, caplog: pytest.LogCaptureFixture, raises: bool, lost: str
) -> None:
    links = lab.links()
    runs = _Ends(raises=raises)
    runs.release.set()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    # From here on the completer has its connection and its statements: one for several, one for a task alone.
    last = "failed" if raises else "completed"
    stored = {"completed": 1, "failed": 1} if raises else {"completed": 2}
    ids = lab.enqueue(None, "hold", max_attempts=1)
    lab.wait_for(**stored)
    ids += lab.enqueue("hold", max_attempts=1)
    stored[last] += 1
    lab.wait_for(**stored)
    wait_until(lambda: consumer.stats()["completed"] + consumer.stats()["failed"] == 3)
    stored[last] += 1
    if lost == "request":
        links.hold_requests("complete")
        ids += lab.enqueue("hold", max_attempts=1)
        links.wait_for_request("complete")
    else:
        links.hold_answers("complete")
        ids += lab.enqueue("hold", max_attempts=1)
        lab.wait_for(**stored)
        links.wait_for_answer("complete")
    if lost == "answer and look-up":
        links.cut_at("complete", b"attempt_error e WHERE")
    links.cut("complete")
    lab.wait_for(**stored)
    lab.enqueue(None)
    stored["completed"] += 1
    lab.wait_for(**stored)
    wait_until(lambda: consumer.stats()["flushes"] >= 3 and consumer.stats()["completed"] >= stored["completed"])
    assert "refused" not in caplog.text
    counted = {name: consumer.stats()[name] for name in ("completed", "failed", "retried", "refused")}
    assert counted == {"failed": 0, "retried": 0, "refused": 0} | stored
    assert sorted(runs.started)[:4] == [(id_, 1) for id_ in ids]
    assert len(runs.started) == 5
    assert len(lab.completions()) == stored["completed"]
    assert lab.value("SELECT count(*) FROM attempt_error") == stored.get("failed", 0)
    if lost == "answer and look-up":
        assert links.requests["complete"].count(b"attempt_error e WHERE") >= 2


def test_a_result_in_doubt_of_a_run_that_was_rescued_meanwhile_is_refused_and_not_taken_for_stored(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    lab.enqueue(None)
    lab.wait_for(completed=1)
    [held] = lab.enqueue("hold")
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=[held])
    links.hold_requests("complete")
    runs.release.set()
    links.wait_for_request("complete")
    lab.declare_dead(me)
    # The rescuer notes the lost run under the same consumer and claim.
    wait_until(lambda: lab.losses() == {held: 1})
    links.cut("complete")
    lab.wait_for(completed=2)
    wait_until(lambda: consumer.stats()["refused"] == 1)
    wait_until(lambda: f"the tasks are no longer ours (ids {held})" in caplog.text)
    assert lab.completions()[held] == 2
    wait_until(lambda: consumer.stats()["completed"] == 2)


# --- workers that stand still ----------------------------------------------------------------------


def test_a_worker_that_stood_still_past_its_death_starts_nothing_it_lost_and_its_result_is_refused(lab: Lab) -> None:
    gate = lab.gate()
    worker = lab.worker(concurrency=1)
    warm_up = lab.enqueue(count=200)
    lab.wait_for(completed=200)
    # One batch of its thread: what comes behind the held one is a function call away from its start.
    [held, *waiting] = lab.enqueue(gate.orders, *(None for _ in range(50)))
    me = lab.consumer_id(pid=worker.pid)
    lab.wait_for_beat(me, running=[held])
    assert lab.claimed(me) > {held}
    worker.freeze()
    runs = Runs()
    others = lab.consumer(runs)
    lab.wait_for(completed=251)
    assert sorted(runs.started) == [(held, 2)] + [(id_, 1) for id_ in waiting]
    others.stop()
    gate.open()
    worker.thaw()
    again = lab.consumer_id(pid=worker.pid, other_than=[me])
    [last] = lab.enqueue(None)
    lab.wait_for(completed=252)
    assert lab.journal.started() == [*warm_up, held, last]
    assert lab.value("SELECT consumer FROM done WHERE ids @> %s::bigint", last) == again
    wait_until(lambda: f"the tasks are no longer ours (ids {held})" in worker.log)
    assert "was declared dead" in worker.log
    assert lab.completions() == dict.fromkeys([*warm_up, *waiting, last], 1) | {held: 2}


def test_a_worker_that_stood_still_for_a_moment_keeps_all_that_it_holds(lab: Lab) -> None:
    gate = lab.gate()
    others = Runs()
    lab.consumer(others, type="other", dead_after=20)
    lab.wait_until_leads(id_=lab.consumer_id())
    worker = lab.worker(concurrency=1, dead_after=20)
    ids = lab.enqueue(gate.orders, *(None for _ in range(50)))
    wait_until(lambda: lab.journal.started() == ids[:1])
    worker.freeze()
    wait_until(
        lambda: lab.value(
            "SELECT beat_at < clock_timestamp() - interval '1 second' FROM consumer WHERE pid = %s", worker.pid
        )
    )
    gate.open()
    worker.thaw()
    lab.wait_for(completed=51)
    assert sorted(lab.journal.started()) == ids
    assert lab.completions() == dict.fromkeys(ids, 1)


# --- stops -----------------------------------------------------------------------------------------


def test_a_stop_gives_back_what_has_not_started_in_front_of_all_that_waits_and_uncharged(lab: Lab) -> None:
    runs = Runs()
    consumer = lab.consumer(runs, concurrency=1, prefetch=10)
    lab.enqueue(count=100)
    lab.wait_for(completed=100)
    # It is full with these; they wait behind a long backlog unless they come back to the front.
    ids = lab.enqueue("hold", *(None for _ in range(300)))
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=ids[:1])
    assert lab.claimed(me) > {ids[0]}
    stopping = threading.Thread(target=consumer.stop, args=(20,))
    stopping.start()
    wait_until(lambda: lab.claimed(me) == {ids[0]})
    # The one that runs is drained.
    assert stopping.is_alive()
    runs.release.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert states(lab.db) == {"completed": 101, "pending": 300}
    assert lab.value("SELECT max(attempts) FROM ready") == 0
    assert lab.value("SELECT count(*) FROM consumer") == 0
    held = {id_ for (id_,) in lab.all("SELECT generate_series(lo, hi) FROM ready WHERE track = 1")}
    assert consumer.stats()["given_back"] == len(held) > 0
    others = Runs()
    lab.consumer(others, concurrency=1)
    lab.wait_for(completed=401)
    assert set(others.ids[: len(held)]) == held
    assert others.started == [(id_, 1) for id_ in others.ids]


def test_a_stop_that_gives_up_leaves_the_rest_to_others_at_once_and_charges_what_runs(lab: Lab) -> None:
    runs, others = Runs(), Runs()
    consumer = lab.consumer(runs, concurrency=2, dead_after=600)
    lab.enqueue(count=100)
    lab.wait_for(completed=100)
    ids = lab.enqueue("hold", "hold")
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=ids)
    waiting = lab.enqueue(count=5)
    wait_until(lambda: lab.claimed(me) == {*ids, *waiting})
    others.release.set()
    # The dead time has no part in it.
    lab.consumer(others, dead_after=600)
    consumer.stop(0.1)
    lab.wait_for(completed=107)
    assert sorted(others.started) == [(id_, 2) for id_ in ids] + [(id_, 1) for id_ in waiting]
    assert lab.losses() == dict.fromkeys(ids, 1)
    # What the abandoned handlers do afterwards counts for nothing.
    runs.release.set()
    wait_until(lambda: all(runs.ended[id_] for id_ in ids))
    assert lab.completions() | dict.fromkeys(ids, 2) == lab.completions()


def test_an_interpreter_that_ends_without_a_stop_while_the_database_is_away_does_not_hang(lab: Lab) -> None:
    links = lab.links()
    lab.enqueue(None)
    code = f"""
import sys, threading
import fastq
consumer = fastq.Consumer({links.dsn!r}, schema={lab.schema!r}, heartbeat_interval=0.2)
@consumer.handler("t")
def handle(task):
    print("started", flush=True)
    threading.Event().wait()
consumer.start()
sys.stdin.readline()
"""
    with start_python(code, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            links.refuse()
            _, errors = process.communicate("\n", timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "could not sign off" in errors
    # Its task is found by the missing heartbeat.
    runs = Runs()
    lab.consumer(runs)
    lab.wait_for(completed=1)
    assert len(runs.ids) == 1
