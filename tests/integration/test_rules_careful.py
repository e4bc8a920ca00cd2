"""Tasks that were lost before: who is charged beside a killer, and claims of them that fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_rule_2_beside_a_killer_on_track_2_nobody_is_charged_without_a_start(lab: Lab, max_attempts: int) -> None:
    """It ends the process before all of its neighbours, claimed with it, have begun: each needs a thread, and they come one by one."""
    gate = lab.gate()
    [killer, *innocents] = lab.enqueue({"kill": "signal"}, *[gate.orders] * 99, max_attempts=max_attempts)
    lab.db.execute("UPDATE ready SET track = 2")
    unstarted: set[int] = set()
    workers = 0
    while lab.value("SELECT count(*) FROM tasks WHERE state IN ('completed', 'failed')") < 100:
        workers += 1
        assert workers <= max_attempts + 3
        worker = lab.worker(concurrency=100)
        wait_until(
            lambda worker=worker: (
                worker.is_dead  # type: ignore[misc]
                or lab.value("SELECT count(*) FROM tasks WHERE state IN ('completed', 'failed')") == 100
            ),
            timeout=20,
            message="the end of the worker, or of all tasks",
        )
        if worker.is_dead and not unstarted:
            [me] = lab.ids_of(worker.pid)
            unstarted = lab.claimed(me) - set(lab.journal.started())
            gate.open()
    # Else nothing was shown.
    assert unstarted
    starts = lab.journal.started()
    assert starts.count(killer) <= max_attempts + 1
    assert lab.all("SELECT id, attempts FROM dead") == [(killer, max_attempts)]
    assert lab.losses() == {killer: max_attempts}
    assert lab.completions() == dict.fromkeys(innocents, 1)


@pytest.mark.parametrize(("concurrency", "workers"), [(1, None), (8, 1)])
def test_a_careful_task_and_one_that_runs_alone_that_wait_for_the_same_slot_both_run(
    lab: Lab, concurrency: int, workers: int | None
) -> None:
    gate = lab.gate()
    worker = lab.worker(types={"t": workers}, concurrency=concurrency)
    [held] = lab.enqueue(gate.orders)
    wait_until(lambda: lab.journal.started() == [held])
    # Rows of their own: what was enqueued together would be moved together.
    ids = [lab.enqueue(None)[0] for _ in range(3)]
    for track, id_ in ((2, ids[0]), (3, ids[1])):
        assert lab.all("UPDATE ready SET track = %s WHERE lo = %s RETURNING lo", track, id_)
    [me] = lab.ids_of(worker.pid)
    # Ticks show both to the claimer, which then waits for quiet.
    for _ in range(4):
        beat = lab.value("SELECT beat_at FROM consumer WHERE id = %s", me)
        wait_until(
            lambda beat=beat: lab.value("SELECT beat_at > %s FROM consumer WHERE id = %s", beat, me)  # type: ignore[misc]
        )
    gate.open()
    lab.wait_for(completed=4)
    assert lab.completions() == dict.fromkeys([held, *ids], 1)


def test_a_claim_of_what_runs_alone_that_fails_is_told_and_holds_nothing_up(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    [alone] = lab.enqueue(None)
    lab.db.execute("UPDATE ready SET track = 3")
    lab.refuse("claim", "NEW.track = {0}", 3, code="55000")
    runs = Runs()
    lab.consumer(runs)
    told = "can't claim tasks that were lost before, and keeps trying: no such row here"
    wait_until(lambda: told in caplog.text)
    for _ in range(5):
        count = len(runs.ids)
        lab.enqueue(count=10)
        wait_until(lambda count=count: len(runs.ids) == count + 10)  # type: ignore[misc]
    assert caplog.text.count(told) == 1
    lab.db.execute("DROP TRIGGER refuse ON claim")
    lab.wait_for(completed=51)
    assert runs.ids[-1] == alone


def test_claims_that_fail_for_long_are_told_once_and_once_again_when_they_work(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    lab.enqueue(None)
    lab.refuse("claim", "NEW.no > {0}", 0, code="55000")
    runs = Runs()
    with caplog.at_level(logging.DEBUG, logger="fastq"):
        consumer = lab.consumer(runs, dsn=links.dsn)
        # The first is told; those after it, further and further apart, only to who debugs.
        wait_until(lambda: caplog.text.count("can't claim, and keeps trying") >= 5)
        lab.db.execute("DROP TRIGGER refuse ON claim")
        wait_until(lambda: "claims again" in caplog.text)
        # An outage: a line of each part when it begins, and one when it is over.
        caplog.clear()
        links.refuse()
        wait_until(lambda: caplog.text.count("heartbeat and upkeep fail") >= 4)
        links.accept()
        wait_until(lambda: "claims again" in caplog.text and "is connected again" in caplog.text)
        consumer.stop()
    told = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    for what in ("can't claim", "claims again", "heartbeat and upkeep fail", "is connected again"):
        assert sum(what in message for message in told) == 1, what
    assert b"migration" not in links.requests["claim"], "the schema is looked at once, by the connection that controls"
