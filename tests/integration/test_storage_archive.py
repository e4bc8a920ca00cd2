"""The archive by hand: what retention removes is copied first, each task once, whoever crashes, races or holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.support.leaves import close_leaf, run_all
from tests.support.storage import Leader, Session, Worker, add_lane, enqueue, states

OpenSession = Callable[[], Session]
#: Queues, seconds and whether they are archived: all of them, at once.
ALL: tuple[list[str | None], list[float], list[bool]] = ([None], [0.0], [True])


@pytest.fixture
def leader(store: Session) -> Leader:
    """The one leader, with a long lease."""
    found = Leader(store)
    found.tick()
    return found


def archive(leader: Leader, leaf: int = 0, rules: Any = ALL, *, deletes: bool = False, completions: int = 500) -> int:
    """A walk through a leaf, as the leader makes it; gives how many tasks went."""
    after, gone, more = 0, 0, True
    while more:
        tasks, last, more, _ = leader.one(
            "archive_done", leaf, rules[0], rules[1], completions, after, rules[2], deletes
        )
        gone += tasks
        after = after if last is None else last
    return gone


def empty(leader: Leader, leaf: int = 0, rules: Any = ALL) -> bool:
    """The transaction by which a leaf is emptied of which something is archived. False: something is left."""
    session = leader.session
    session.begin()
    try:
        session.sql("SET LOCAL lock_timeout = '50ms'")
        session.run("lock_leaf", leaf=leaf)
        may_go = (
            leader.one("check_leaf_empty", leaf, 0.0)[0]
            and session.one("check_leaf_archived", leaf, rules[0], rules[2])[0]
        )
        if may_go:
            session.run("free_leaf", leaf)
            session.run("truncate_leaf", leaf=leaf)
    except BaseException:
        session.rollback()
        raise
    session.commit()
    return bool(may_go)


def archived(store: Session) -> list[int]:
    """The ids in the archive, as often as they are in it."""
    return [id_ for (id_,) in store.sql("SELECT id FROM fastq.archive ORDER BY id")]


def twin_of(leader: Leader, session: Session) -> Leader:
    """Another one that takes itself for the leader of the same term."""
    twin = Leader(session, leader.id)
    twin.term = leader.term
    return twin


# --- leaves that are emptied whole ---------------------------------------------------------------


def test_a_leaf_goes_into_the_archive_and_is_emptied(store: Session, leader: Leader) -> None:
    lane = add_lane(store, "mail", "audit", 7)
    ids = enqueue(store, 3, lane=lane, payload=b"[7]", max_attempts=5)
    worker = Worker(store, 1)
    [chunk] = worker.claim(lanes=[lane])
    worker.fail(chunk.no, ids[:1], 0.0)
    worker.complete({chunk.no: ids[1:]})
    leader.run("promote_tasks", 10, 0)
    [chunk] = worker.claim(lanes=[lane])
    worker.complete({chunk.no: ids[:1]})
    before = store.sql(
        "SELECT id, type, queue, priority, state, attempts, max_attempts, created_at, ended_at FROM fastq.tasks ORDER BY id"
    )
    close_leaf(leader)
    assert archive(leader) == 3
    assert states(store) == {}
    assert (
        store.sql(
            "SELECT id, type, queue, priority, state, attempts, max_attempts, created_at, ended_at FROM fastq.archive ORDER BY id"
        )
        == before
    )
    assert store.sql("SELECT format::text, payload, error FROM fastq.archive ORDER BY id") == [
        ("j", b"[7]", "ValueError: no"),
        ("j", b"[7]", None),
        ("j", b"[7]", None),
    ]
    assert empty(leader)
    assert store.sql("SELECT count(*) FROM fastq.task") == [(0,)]
    assert archived(store) == list(ids)


def test_only_queues_that_are_archived_are(store: Session, leader: Leader) -> None:
    audit, plain = add_lane(store, queue="audit"), add_lane(store)
    kept = enqueue(store, 3, lane=audit)
    enqueue(store, 4, lane=plain)
    worker = Worker(store, 1)
    for chunk in worker.claim(lanes=[audit, plain]):
        worker.complete({chunk.no: chunk.ids or []})
    close_leaf(leader)
    rules = ([None, "audit"], [float("inf"), 0.0], [False, True])
    assert not empty(leader, rules=rules)
    assert archive(leader, rules=rules) == 3
    assert empty(leader, rules=rules)
    assert archived(store) == list(kept)


def test_what_is_not_due_or_did_not_complete_is_left(store: Session, leader: Leader) -> None:
    old, young = enqueue(store, 2), enqueue(store, 2)
    run_all(store, 1)
    store.sql("UPDATE fastq.done SET done_at = done_at - interval '1 hour' WHERE lo = $1", old[0])
    failed = enqueue(store, 1)
    worker = Worker(store, 2)
    [chunk] = worker.claim()
    worker.fail(chunk.no, failed)
    waiting = enqueue(store, 2)
    close_leaf(leader)
    assert archive(leader, rules=([None], [60.0], [True])) == 2
    assert archived(store) == list(old)
    assert states(store) == (
        dict.fromkeys(young, "completed") | dict.fromkeys(failed, "failed") | dict.fromkeys(waiting, "pending")
    )


@pytest.mark.parametrize("committed", [True, False])
def test_a_crash_before_the_leaf_is_emptied(
    store: Session, leader: Leader, open_session: OpenSession, committed: bool
) -> None:
    """What was copied is not copied again, what was not is: the statement that copies takes what it copies out of `done`."""
    ids = [*enqueue(store, 600), *enqueue(store, 5)]
    run_all(store, 1)
    close_leaf(leader)
    crashing = twin_of(leader, open_session())
    crashing.session.begin()
    assert crashing.one("archive_done", 0, *ALL[:2], 1, 0, ALL[2], False)[0] == 500
    if committed:
        crashing.session.commit()
    crashing.session.close()
    assert len(states(store)) == (105 if committed else 605)
    # Its successor has a term of its own.
    store.sql("UPDATE fastq.leader SET expires_at = clock_timestamp() - interval '1 second'")
    successor = Leader(store, 901)
    successor.tick()
    assert archive(leader) == 0
    assert archive(successor) == (105 if committed else 605)
    assert empty(successor)
    assert archived(store) == ids


def test_two_leaders_archive_each_task_once(store: Session, leader: Leader, open_session: OpenSession) -> None:
    ids = [*enqueue(store, 600), *enqueue(store, 5)]
    run_all(store, 1)
    close_leaf(leader)
    twin = twin_of(leader, open_session())
    store.begin()
    assert leader.one("archive_done", 0, *ALL[:2], 1, 0, ALL[2], False)[0] == 500
    # The second one waits for nothing, and takes what the first has not.
    twin.session.sql("SET lock_timeout = '1ms'")
    assert archive(twin) == 105
    with pytest.raises(psycopg.errors.LockNotAvailable):
        empty(twin)
    store.commit()
    assert archive(twin) == 0
    assert empty(twin)
    assert not empty(leader)
    assert archived(store) == ids


def test_a_leaf_whose_archive_was_given_up_stays(store: Session, leader: Leader, open_session: OpenSession) -> None:
    ids = enqueue(store, 10)
    run_all(store, 1)
    close_leaf(leader)
    twin = twin_of(leader, open_session())
    store.begin()
    assert archive(leader) == 10
    assert archive(twin) == 0
    store.rollback()
    # The second one has looked through the leaf and found nothing: the check under the lock finds what came back.
    assert not empty(twin)
    assert states(store) == dict.fromkeys(ids, "completed")
    assert archive(twin) == 10
    assert empty(twin)
    assert archived(store) == list(ids)


def test_what_completes_after_the_copy_keeps_the_leaf(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2, chunk=1)
    worker = Worker(store, 1)
    first, second = worker.claim()
    worker.complete({first.no: first.ids or []})
    close_leaf(leader)
    assert archive(leader) == 1
    worker.complete({second.no: second.ids or []})
    assert not empty(leader)
    assert archive(leader) == 1
    assert empty(leader)
    assert archived(store) == list(ids)


def test_what_a_client_holds_is_passed_by(store: Session, leader: Leader, open_session: OpenSession) -> None:
    ids = enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    client = open_session()
    client.begin()
    assert client.run("delete_done", [ids[0]]) == [(ids[0],)]
    client.run("forget_tasks", [ids[0]])
    store.sql("SET lock_timeout = '1ms'")
    assert archive(leader) == 0
    client.commit()
    # What is deleted is not archived: it is no retention that removes it.
    assert archive(leader) == 2
    store.sql("RESET lock_timeout")
    assert empty(leader)
    assert archived(store) == list(ids[1:])


def test_steps_are_bounded_by_tasks_and_by_bytes(store: Session, leader: Leader) -> None:
    small = [id_ for _ in range(6) for id_ in enqueue(store, 500)]
    run_all(store, 1)
    close_leaf(leader)
    tasks, after, more, _ = leader.one("archive_done", 0, *ALL[:2], 500, 0, ALL[2], False)
    assert (tasks, more) == (2000, True)
    assert leader.one("archive_done", 0, *ALL[:2], 500, after, ALL[2], False)[::2] == (1000, False)
    large = [id_ for _ in range(9) for id_ in enqueue(store, 3, leaf=1, payload=b"x" * 1_000_000)]
    run_all(store, 2)
    close_leaf(leader)
    steps, after, more = [], 0, True
    while more:
        tasks, after, more, _ = leader.one("archive_done", 1, *ALL[:2], 500, after, ALL[2], False)
        steps.append(tasks)
    # A completion of many large tasks goes whole; the next one only while there is room.
    assert sum(steps) == 27
    assert max(steps) <= 9 + 6
    assert empty(leader, 0)
    assert empty(leader, 1)
    assert archived(store) == [*small, *large]
    assert store.sql("SELECT count(*) FROM fastq.archive WHERE octet_length(payload) = 1000000") == [(27,)]


def test_a_task_without_content_keeps_no_leaf(store: Session, leader: Leader) -> None:
    """Somebody deleted its row by hand: there is nothing to archive."""
    ids = enqueue(store, 2)
    run_all(store, 1)
    store.sql("DELETE FROM fastq.task WHERE id = $1", ids[0])
    close_leaf(leader)
    assert archive(leader) == 1
    assert empty(leader)
    assert archived(store) == list(ids[1:])


# --- what goes row by row --------------------------------------------------------------------------


def test_row_by_row_with_their_contents(store: Session, leader: Leader) -> None:
    audit, cache, plain = add_lane(store, queue="audit"), add_lane(store, queue="cache"), add_lane(store)
    kept = [*enqueue(store, 600, lane=audit)]
    enqueue(store, 3, lane=cache)
    stays = enqueue(store, 4, lane=plain)
    waiting = enqueue(store, 2, lane=add_lane(store, "other", "audit"))
    worker = Worker(store, 1)
    for chunk in worker.claim(2000, lanes=[audit, cache, plain]):
        worker.complete({chunk.no: chunk.ids or []})
    rules = ([None, "audit", "cache"], [float("inf"), 0.0, 0.0], [True, True, False])
    assert archive(leader, rules=rules, deletes=True, completions=1) == 603
    assert archived(store) == kept
    assert states(store) == dict.fromkeys(stays, "completed") | dict.fromkeys(waiting, "pending")
    assert store.sql("SELECT id FROM fastq.task ORDER BY id") == [(id_,) for id_ in sorted([*stays, *waiting])]


def test_the_walk_goes_on_at_what_will_have_to_go(store: Session, leader: Leader) -> None:
    old, young = enqueue(store, 2), enqueue(store, 2)
    run_all(store, 1)
    store.sql("UPDATE fastq.done SET done_at = done_at - interval '1 hour' WHERE lo = $1", old[0])
    rules: tuple[list[None], list[float], list[bool]] = ([None], [60.0], [True])
    found = leader.one("archive_done", 0, *rules[:2], 500, 0, rules[2], True)
    assert found == (2, young[0], False, young[0])


def test_each_bad_end_of_each_queue(store: Session, leader: Leader) -> None:
    plain, audit = add_lane(store), add_lane(store, queue="audit")
    ids = {}
    for number, (lane, state) in enumerate(
        (lane, state) for lane in (plain, audit) for state in ("failed", "cancelled", "expired")
    ):
        [id_] = enqueue(store, 1, lane=lane, payload=b"[7]")
        worker = Worker(store, 10 + number)
        [chunk] = worker.claim(lanes=[lane])
        worker.fail(chunk.no, [id_])
        store.sql("UPDATE fastq.dead SET state = $1 WHERE id = $2", state, id_)
        ids[lane, state] = id_
    rules = (
        ["failed", "cancelled", "expired", "failed", "cancelled", "expired"],
        [None, None, None, "audit", "audit", "audit"],
        [0.0, 0.0, 3600.0, 0.0, 0.0, 0.0],
        [True, False, True, False, True, True],
    )
    assert leader.one("archive_dead", *rules, 500) == (5, False)
    assert states(store) == {ids[plain, "expired"]: "expired"}
    assert store.sql("SELECT id, queue, state, attempts, payload, error FROM fastq.archive ORDER BY id") == sorted(
        (ids[lane, state], queue, state, 1, b"[7]", "ValueError: no")
        for lane, queue, state in (
            (plain, "default", "failed"),
            (audit, "audit", "cancelled"),
            (audit, "audit", "expired"),
        )
    )


def test_steps_through_the_dead_are_bounded_by_tasks_and_by_bytes(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 10, payload=b"x" * 1_000_000)
    worker = Worker(store, 1)
    for chunk in worker.claim():
        worker.fail(chunk.no, chunk.ids or [])
    rules = (["failed"], [None], [0.0], [True])
    assert leader.one("archive_dead", *rules, 4) == (4, True)
    steps = [(4, True)]
    while steps[-1][1]:
        steps.append(leader.one("archive_dead", *rules, 500))
    assert sum(tasks for tasks, _ in steps) == 10
    assert archived(store) == list(ids)


def test_a_dead_task_that_somebody_holds_is_passed_by(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    [chunk] = worker.claim()
    worker.fail(chunk.no, ids)
    client = open_session()
    client.begin()
    assert client.run("retry_dead", [ids[0]], ["failed"]) == [(ids[0],)]
    assert leader.one("archive_dead", ["failed"], [None], [0.0], [True], 500) == (1, False)
    client.commit()
    assert leader.one("archive_dead", ["failed"], [None], [0.0], [True], 500) == (0, False)
    assert states(store) == {ids[0]: "pending"}
    assert archived(store) == [ids[1]]


def test_a_leader_of_yesterday_archives_nothing(store: Session, leader: Leader) -> None:
    done, failed = enqueue(store, 2), enqueue(store, 1)
    worker = Worker(store, 1)
    for chunk in worker.claim():
        if chunk.ids == list(failed):
            worker.fail(chunk.no, failed)
        else:
            worker.complete({chunk.no: done})
    leader.term += 1
    assert archive(leader) == 0
    assert leader.one("archive_dead", ["failed"], [None], [0.0], [True], 500) == (0, False)
    assert archived(store) == []
    assert states(store) == dict.fromkeys(done, "completed") | dict.fromkeys(failed, "failed")


def test_another_table_may_stand_in_its_place(store: Session, leader: Leader) -> None:
    """As docs/operations.md has it, while the leader's statement is prepared."""
    first = enqueue(store, 2)
    run_all(store, 1)
    assert archive(leader) == 2
    store.sql("ALTER TABLE fastq.archive RENAME TO archive_before")
    store.sql("CREATE TABLE fastq.archive (LIKE fastq.archive_before) PARTITION BY RANGE (ended_at)")
    store.sql("CREATE TABLE fastq.archive_rest PARTITION OF fastq.archive DEFAULT")
    second = enqueue(store, 2)
    run_all(store, 2)
    assert archive(leader) == 2
    assert archived(store) == list(second)
    assert store.sql("SELECT id FROM fastq.archive_before ORDER BY id") == [(id_,) for id_ in first]
