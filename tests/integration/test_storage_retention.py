"""What is forgotten when: failed tasks, and the errors of all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.leaves import clear, close_leaf
from tests.support.storage import Leader, Session, Worker, add_lane, enqueue, states


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
    assert leader.one("purge_dead", ["failed"], [None], [7 * 86400.0], 2) == (2,)
    assert leader.one("purge_dead", ["failed"], [None], [7 * 86400.0], 2) == (1,)
    assert leader.one("purge_dead", ["failed"], [None], [7 * 86400.0], 2) == (0,)
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


def end(store: Session, lane: int, state: str, days: float) -> int:
    """A task of this lane that ended badly so long ago."""
    [id_] = end_badly(store, 1, store.value("SELECT count(*) + 100 FROM fastq.consumer"))
    store.sql(
        "UPDATE fastq.dead SET lane = $1, state = $2, ended_at = ended_at - $3::double precision * interval '1 day' WHERE id = $4",
        lane,
        state,
        days,
        id_,
    )
    return id_


def test_each_queue_keeps_each_bad_end_for_its_own_time(store: Session, leader: Leader) -> None:
    default, audit = add_lane(store), add_lane(store, queue="audit")
    kept = {
        end(store, default, "failed", 2.9): "failed",
        end(store, default, "cancelled", 0.9): "cancelled",
        end(store, audit, "failed", 29): "failed",
        # audit says nothing of cancelled ones.
        end(store, audit, "cancelled", 0.9): "cancelled",
    }
    gone = [
        end(store, default, "failed", 3.1),
        end(store, default, "cancelled", 1.1),
        end(store, audit, "failed", 31),
        end(store, audit, "cancelled", 1.1),
    ]
    rules = (["failed", "cancelled", "failed"], [None, None, "audit"], [3 * 86400.0, 86400.0, 30 * 86400.0])
    assert leader.one("purge_dead", *rules, 3) == (3,)
    assert leader.one("purge_dead", *rules, 3) == (len(gone) - 3,)
    assert leader.one("purge_dead", *rules, 3) == (0,)
    assert states(store) == kept


def completed(store: Session, lane: int, count: int) -> list[int]:
    ids = enqueue(store, count, lane=lane)
    worker = Worker(store, store.value("SELECT count(*) + 200 FROM fastq.consumer"))
    for chunk in worker.claim(count, lanes=[lane]):
        assert chunk.ids is not None
        worker.complete({chunk.no: chunk.ids})
    return list(ids)


def test_completed_tasks_of_a_queue_that_keeps_them_for_less_go_row_by_row(store: Session, leader: Leader) -> None:
    default, cache = add_lane(store), add_lane(store, queue="cache")
    kept = completed(store, default, 3)
    gone = completed(store, cache, 1000) + completed(store, cache, 4)
    young = completed(store, cache, 2)
    store.sql("UPDATE fastq.done SET done_at = done_at - interval '1 hour' WHERE lo < $1", young[0])
    waiting = list(enqueue(store, 2, lane=cache))
    rules = ([None, "cache"], [float("inf"), 60.0])
    tasks, last, more, first_kept = leader.one("purge_done", 0, *rules, 500, 0)
    assert (tasks, last, more, first_kept) == (len(gone), young[0], False, young[0])
    assert states(store) == dict.fromkeys([*kept, *young], "completed") | dict.fromkeys(waiting, "pending")
    assert store.sql("SELECT id FROM fastq.task ORDER BY id") == [(id_,) for id_ in sorted([*kept, *young, *waiting])]


def test_completed_tasks_that_a_client_holds_are_passed_by(
    store: Session, leader: Leader, open_session: Callable[[], Session]
) -> None:
    """Its transaction may be open for long, and the leader's heartbeat goes the same way as this."""
    lane = add_lane(store)
    held, gone = completed(store, lane, 2), completed(store, lane, 2)
    client = open_session()
    client.begin()
    assert client.run("delete_done", held[:1]) == [(held[0],)]
    client.run("forget_tasks", held[:1])
    store.sql("SET lock_timeout = '1ms'")
    assert leader.one("purge_done", 0, [None], [0.0], 500, 0)[:2] == (len(gone), gone[0])
    client.commit()
    assert states(store) == {held[1]: "completed"}
    assert leader.one("purge_done", 0, [None], [0.0], 500, 0)[0] == 1


def test_a_queue_may_keep_for_longer_than_the_rest(store: Session, leader: Leader) -> None:
    default, audit = add_lane(store), add_lane(store, queue="audit")
    kept, _ = completed(store, audit, 3), completed(store, default, 3)
    assert leader.one("purge_done", 0, [None, "audit"], [0.0, float("inf")], 500, 0)[0] == 3
    assert states(store) == dict.fromkeys(kept, "completed")


def test_completions_are_looked_at_in_steps(store: Session, leader: Leader) -> None:
    lane = add_lane(store)
    ids = [id_ for _ in range(5) for id_ in completed(store, lane, 1)]
    after, seen = 0, 0
    for expected in (2, 2, 1):
        tasks, after, more, _ = leader.one("purge_done", 0, [None], [0.0], 2, after)
        assert tasks == expected
        seen += tasks
        assert more == (expected == 2)
    assert seen == len(ids)
    assert states(store) == {}


def test_a_step_takes_five_thousand_tasks_and_goes_on_behind_them(store: Session, leader: Leader) -> None:
    lane = add_lane(store)
    ids = [id_ for _ in range(14) for id_ in completed(store, lane, 500)]
    tasks, after, more, _ = leader.one("purge_done", 0, [None], [0.0], 500, 0)
    assert (tasks, more) == (5000, True)
    tasks, _, more, _ = leader.one("purge_done", 0, [None], [0.0], 500, after)
    assert (tasks, more) == (len(ids) - 5000, False)
    assert states(store) == {}
