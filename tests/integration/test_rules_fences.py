"""Guards that only an interleaving shows: answers that come too late, calls that are under way, a leader that was away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Consumer
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


def _wait_for_beats(consumer: Consumer, count: int) -> None:
    beats = consumer.stats()["beats"] + count
    wait_until(lambda: consumer.stats()["beats"] >= beats, message=f"{count} heartbeats")


def test_rule_1_what_a_claim_brings_after_it_was_rescued_is_not_started(lab: Lab) -> None:
    links = lab.links()
    late, others = Runs(), Runs()
    consumer = lab.consumer(late, dsn=links.dsn, dead_after=60)
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    links.hold_answers("claim")
    ids = lab.enqueue(count=20)
    wait_until(lambda: lab.claimed(me) == set(ids))
    lab.declare_dead(me)
    lab.consumer_id(other_than=[me])
    wait_until(lambda: not lab.claimed(me), message="the rescue")
    second = lab.consumer(others)
    lab.wait_for(completed=21)
    second.stop()
    # Only now does it hear what it had claimed, in a name that it has given up.
    links.flow("claim")
    [last] = lab.enqueue(None)
    lab.wait_for(completed=22)
    assert late.ids == [first, last]
    assert sorted(others.ids) == ids
    assert consumer.stats()["refused"] == 0


def test_a_claim_whose_answer_is_under_way_is_not_given_back_by_the_heartbeat(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    me = lab.consumer_id()
    links.hold_answers("claim")
    ids = lab.enqueue(count=20)
    wait_until(lambda: lab.claimed(me) == set(ids))
    links.wait_for_answer("claim")
    # Each of them sees that the database says it holds a claim that it does not know of.
    _wait_for_beats(consumer, 3)
    assert lab.claimed(me) == set(ids)
    links.flow("claim")
    lab.wait_for(completed=21)
    assert sorted(runs.started) == [(id_, 1) for id_ in [first, *ids]]
    assert consumer.stats()["refused"] == 0


def test_rule_3_a_leader_that_is_back_first_declares_nobody_dead_for_its_own_absence(lab: Lab) -> None:
    leader_links, worker_links = lab.links(), lab.links()
    runs = Runs()
    leader = lab.consumer(dsn=leader_links.dsn, dead_after=3)
    lab.wait_until_leads(id_=lab.consumer_id())
    [held] = lab.enqueue("hold")
    worker = lab.consumer(runs, dsn=worker_links.dsn, dead_after=3)
    wait_until(lambda: runs.ids == [held])
    _wait_for_beats(worker, 1)
    before = lab.all("SELECT id FROM consumer ORDER BY id")
    for links in (leader_links, worker_links):
        links.hold_requests("control")
    wait_until(
        lambda: lab.value("SELECT bool_and(beat_at < clock_timestamp() - interval '4 seconds') FROM consumer"),
        timeout=20,
        message="the dead time, and more",
    )
    # The leader hears first: to it the worker looks dead, but it could not have heard it.
    leader_links.flow()
    _wait_for_beats(leader, 3)
    assert lab.all("SELECT id FROM consumer WHERE dead_at IS NOT NULL") == []
    worker_links.flow()
    _wait_for_beats(worker, 2)
    runs.release.set()
    lab.wait_for(completed=1)
    assert lab.all("SELECT id FROM consumer WHERE dead_at IS NULL ORDER BY id") == before
    assert lab.completions() == {held: 1}
    assert worker.stats()["refused"] == 0


def test_rule_3_a_thread_starts_no_more_of_its_batch_once_the_deadline_has_passed(lab: Lab) -> None:
    """Nothing but the deadline tells it: its heartbeats get no answer, so nobody takes away what it holds."""
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, concurrency=1)
    warm_up = lab.enqueue(count=300)
    lab.wait_for(completed=300)
    # One batch of its thread: what comes behind the held one is a function call away from its start.
    [held, *waiting] = lab.enqueue("hold", *(None for _ in range(50)))
    me = lab.consumer_id()
    wait_until(lambda: runs.ids[-1] == held and lab.claimed(me) == {held, *waiting})
    links.hold_requests("control")
    wait_until(
        lambda: lab.value("SELECT beat_at < clock_timestamp() - interval '2 seconds' FROM consumer WHERE id = %s", me),
        message="the deadline, and more",
    )
    runs.release.set()
    wait_until(lambda: consumer.stats()["completed"] == 301)
    assert runs.ids == [*warm_up, held]
    links.flow()
    lab.wait_for(completed=351)
    assert sorted(runs.ids) == [*warm_up, held, *waiting]
    assert consumer.stats()["refused"] == 0
