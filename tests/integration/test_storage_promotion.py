"""Delayed tasks whose time has come: promotion."""

from __future__ import annotations

import pytest

from tests.support.leaves import close_leaf, run_all
from tests.support.storage import Leader, Session, Worker, add_lane, chunks_of, delay, enqueue


@pytest.fixture
def leader(store: Session) -> Leader:
    """The one leader, with a long lease."""
    found = Leader(store)
    found.tick()
    return found


def test_due_neighbours_become_one_chunk(store: Session, leader: Leader) -> None:
    delay(store, range(1, 11), 0.0)
    delay(store, [20], 0.0)
    delay(store, [11], 60.0)
    assert leader.one("promote_tasks", 100, 0) == (11, [1])
    assert chunks_of(store) == [(0, 0, 0, 1, 10), (0, 0, 0, 20, 20)]
    assert run_all(store, 1) == [*range(1, 11), 20]


def test_a_promoted_chunk_holds_at_most_500_tasks(store: Session, leader: Leader) -> None:
    delay(store, range(1, 1201), 0.0)
    leader.run("promote_tasks", 5000, 0)
    assert [(lo, hi) for *_, lo, hi in chunks_of(store)] == [(1, 500), (501, 1000), (1001, 1200)]


def test_unlike_neighbours_become_chunks_of_their_own(store: Session, leader: Leader) -> None:
    other = add_lane(store, "other")
    delay(store, [1, 2], 0.0)
    delay(store, [3, 4], 0.0, lane=other)
    delay(store, [5], 0.0, max_attempts=9)
    leader.run("promote_tasks", 100, 0)
    rows = store.sql("SELECT lane, max_attempts, lo, hi FROM fastq.ready ORDER BY lo")
    assert rows == [(1, 3, 1, 2), (other, 3, 3, 4), (1, 9, 5, 5)]


def test_what_was_due_first_is_promoted_first(store: Session, leader: Leader) -> None:
    for id_, seconds in ((30, 0.0), (10, 0.0), (20, 0.0)):
        delay(store, [id_], seconds)
    leader.run("promote_tasks", 2, 0)
    leader.run("promote_tasks", 2, 0)
    assert [lo for *_, lo, _ in chunks_of(store)] == [30, 10, 20]


def test_a_retried_task_gets_no_second_copy_in_its_leaf(store: Session, leader: Leader) -> None:
    """A second copy in the same leaf would run twice in one claim."""
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    worker.claim(1)
    worker.fail(1, [id_], 0.0)
    leader.run("promote_tasks", 100, 0)
    assert store.sql("SELECT leaf FROM fastq.task WHERE id = $1", id_) == [(0,)]
    assert chunks_of(store) == [(0, 0, 1, id_, id_)]
    assert run_all(store, 2) == [id_]


def test_a_scheduled_task_keeps_when_it_was_enqueued(store: Session, leader: Leader) -> None:
    delay(store, [1], 0.0)
    [[enqueued_at]] = store.sql("SELECT created_at FROM fastq.delayed")
    leader.run("promote_tasks", 100, 0)
    assert store.sql("SELECT created_at FROM fastq.task") == [(enqueued_at,)]


def test_a_retry_is_promoted_into_its_own_leaf_when_another_is_open(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    worker.claim(1)
    worker.fail(1, [id_], 0.0)
    opened = close_leaf(leader)
    delay(store, [5_000_001], 0.0)
    leader.run("promote_tasks", 100, opened)
    assert {leaf: lo for _, leaf, _, lo, _ in chunks_of(store)} == {0: id_, opened: 5_000_001}
