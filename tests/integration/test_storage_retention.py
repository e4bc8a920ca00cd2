"""What is forgotten when: failed tasks, and the errors of all."""

from __future__ import annotations

import pytest

from tests.support.leaves import clear, close_leaf
from tests.support.storage import Leader, Session, Worker, enqueue, states


@pytest.fixture
def leader(store: Session) -> Leader:
    """The one leader, with a long lease."""
    found = Leader(store)
    found.tick()
    return found


def end_badly(store: Session, count: int, worker_id: int) -> range:
    """Tasks that failed for good."""
    ids = enqueue(store, count)
    worker = Worker(store, worker_id)
    [chunk] = worker.claim(count)
    worker.fail(chunk.no, ids)
    return ids


def test_failed_tasks_are_kept_for_their_own_time(store: Session, leader: Leader) -> None:
    old, new = end_badly(store, 3, 1), end_badly(store, 2, 2)
    store.sql("UPDATE fastq.dead SET ended_at = ended_at - interval '8 days' WHERE id <= $1", old[-1])
    assert leader.one("purge_dead", 7 * 86400.0, 2) == (2,)
    assert leader.one("purge_dead", 7 * 86400.0, 2) == (1,)
    assert leader.one("purge_dead", 7 * 86400.0, 2) == (0,)
    assert states(store) == dict.fromkeys(new, "failed")


def test_a_failed_task_outlives_its_leaf(store: Session, leader: Leader) -> None:
    ids = end_badly(store, 3, 1)
    close_leaf(leader)
    assert leader.empty_leaf(0)
    assert states(store) == dict.fromkeys(ids, "failed")
    assert store.sql("SELECT DISTINCT payload FROM fastq.dead") == [(b'{"n":1}',)]


def age_errors(store: Session) -> None:
    store.sql("UPDATE fastq.attempt_error SET failed_at = failed_at - interval '1 year'")


def test_errors_are_kept_as_long_as_their_task(store: Session, leader: Leader) -> None:
    dead = end_badly(store, 1, 1)
    ids = enqueue(store, 4)
    worker = Worker(store, 2)
    worker.claim(4)
    worker.fail(1, ids, 0.0)
    leader.run("promote_tasks", 10, 0)
    delayed, running, completed, waiting = ids
    [chunk] = worker.claim(3)
    worker.fail(chunk.no, [delayed], 60.0)
    worker.complete({chunk.no: [completed]})
    age_errors(store)
    everyone = {*dead, delayed, running, completed, waiting}
    assert leader.one("purge_errors", 3600.0, 0, 100) == (0, None)
    assert {id_ for (id_,) in store.sql("SELECT id FROM fastq.attempt_error")} == everyone
    # The leaf goes, with what completed; what still waits and runs had left it.
    worker.complete({chunk.no: [running]})
    close_leaf(leader)
    assert clear(leader, 0)
    store.sql("DELETE FROM fastq.dead")
    assert leader.one("purge_errors", 3600.0, 0, 100)[0] == 3
    assert {id_ for (id_,) in store.sql("SELECT id FROM fastq.attempt_error")} == {delayed, waiting}


def test_errors_are_looked_at_in_steps(store: Session, leader: Leader) -> None:
    ids = end_badly(store, 5, 1)
    store.sql("DELETE FROM fastq.dead")
    store.sql("TRUNCATE fastq.task")
    age_errors(store)
    steps = []
    after: int | None = 0
    while after is not None:
        errors, after = leader.one("purge_errors", 3600.0, after, 2)
        steps.append((errors, after))
    assert steps == [(2, ids[1]), (2, ids[3]), (1, None)]


def test_young_errors_are_kept(store: Session, leader: Leader) -> None:
    """A flush in doubt is looked up among them."""
    end_badly(store, 1, 1)
    store.sql("DELETE FROM fastq.dead")
    store.sql("TRUNCATE fastq.task")
    assert leader.one("purge_errors", 3600.0, 0, 10) == (0, None)
