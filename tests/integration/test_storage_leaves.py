"""The ring of leaves: opened in turn, cleared of what waits, and emptied whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psycopg
import pytest

from tests.support.leaves import clear, close_leaf, leaf_states, run_all
from tests.support.storage import (
    Chunk,
    Leader,
    Session,
    Worker,
    done_ids,
    enqueue,
    in_background,
    reserve,
    states,
    wait_blocked,
)
from tests.support.waiting import wait_until

OpenSession = Callable[[], Session]


@pytest.fixture
def leader(store: Session) -> Leader:
    """The one leader, with a long lease."""
    found = Leader(store)
    found.tick()
    return found


# --- the ring ------------------------------------------------------------------------------------


def test_leaves_open_in_the_order_of_the_ring(store: Session, leader: Leader) -> None:
    assert [close_leaf(leader) for _ in range(15)] == list(range(1, 16))
    assert leader.run("open_leaf", 0.0) == []
    assert leaf_states(store) == dict.fromkeys(range(15), "closed") | {15: "open"}
    assert leader.empty_leaf(3)
    assert close_leaf(leader) == 3


def test_a_leaf_stays_open_for_its_time(store: Session, leader: Leader) -> None:
    assert leader.run("open_leaf", 60.0) == []
    store.sql("UPDATE fastq.leaf SET opened_at = opened_at - interval '61 seconds' WHERE no = 0")
    assert leader.run("open_leaf", 60.0) == [(1,)]


def test_with_no_empty_leaf_the_open_one_only_grows(store: Session, leader: Leader) -> None:
    for _ in range(15):
        close_leaf(leader)
    assert leader.run("open_leaf", 0.0) == []
    ids = enqueue(store, 3, leaf=15)
    assert run_all(store, 1) == list(ids)


def test_leaves_are_due_when_their_retention_is_over(store: Session, leader: Leader) -> None:
    for _ in range(3):
        close_leaf(leader)
    store.sql(
        "UPDATE fastq.leaf SET closed_at = clock_timestamp() - (10 + no) * interval '1 minute' WHERE no IN (0, 2)"
    )
    assert store.run("list_leaves_to_empty", 600.0) == [(2,), (0,)]
    assert store.run("list_leaves_to_empty", 3600.0) == []


def test_a_producer_that_knows_an_old_leaf_does_no_harm(store: Session, leader: Leader) -> None:
    for _ in range(3):
        close_leaf(leader)
    # Closed, and one that is not yet open.
    ids = [*enqueue(store, 3, leaf=1), *enqueue(store, 3, leaf=7)]
    assert run_all(store, 1) == ids


# --- emptying a leaf -----------------------------------------------------------------------------


def test_a_leaf_of_completed_tasks_is_emptied_whole(store: Session, leader: Leader) -> None:
    enqueue(store, 100)
    run_all(store, 1)
    close_leaf(leader)
    kept = enqueue(store, 5, leaf=1)
    assert leader.empty_leaf(0)
    assert store.sql("SELECT count(*) FROM fastq.task_00") == [(0,)]
    assert states(store) == dict.fromkeys(kept, "pending")
    assert done_ids(store) == []
    assert leaf_states(store) == {1: "open"}


def test_an_open_leaf_is_never_emptied(store: Session, leader: Leader) -> None:
    enqueue(store, 3)
    run_all(store, 1)
    assert not leader.empty_leaf(0)


def test_a_leaf_is_kept_until_its_newest_completion_is_old_enough(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    assert not leader.empty_leaf(0, 3600.0)
    store.sql("UPDATE fastq.done SET done_at = done_at - interval '2 hours'")
    late = Worker(store, 2)
    last = enqueue(store, 1)
    late.claim(1)
    late.complete({1: last})
    # Its tasks were old, but one of them was completed just now.
    assert not leader.empty_leaf(0, 3600.0)
    assert states(store) == dict.fromkeys([*ids, *last], "completed")
    store.sql("UPDATE fastq.done SET done_at = done_at - interval '2 hours'")
    assert leader.empty_leaf(0, 3600.0)


def test_waiting_tasks_move_out_and_keep_their_place(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 1200, payload=b"[7]")
    Worker(store, 1).claim(100)
    behind = enqueue(store, 10)
    before = store.sql(
        "SELECT rid, lane, track, attempts, max_attempts, task_bytes, lo, hi FROM fastq.ready ORDER BY rid"
    )
    opened = close_leaf(leader)
    newer = enqueue(store, 5, leaf=opened)
    moved = [leader.one("move_chunks", 0, 2) for _ in range(3)]
    assert [chunks for chunks, _ in moved] == [2, 2, 0]
    assert sum(tasks for _, tasks in moved) == 1110
    after = store.sql(
        "SELECT rid, lane, track, attempts, max_attempts, task_bytes, lo, hi FROM fastq.ready WHERE hi < $1 ORDER BY rid",
        newer[0],
    )
    assert after == before
    assert store.sql("SELECT DISTINCT leaf FROM fastq.ready") == [(opened,)]
    assert states(store) == dict.fromkeys(ids[:100], "running") | dict.fromkeys(
        [*ids[100:], *behind, *newer], "pending"
    )
    assert run_all(store, 2) == [*ids[100:], *behind, *newer]


def test_moving_keeps_when_a_task_was_enqueued_and_what_it_says(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store, payload=b"[7]")
    columns = "SELECT id, created_at, lane, max_attempts, format, payload, expires_at FROM fastq.task WHERE leaf = $1"
    before = store.sql(columns, 0)
    opened = close_leaf(leader)
    leader.run("move_chunks", 0, 10)
    assert store.sql(columns, opened) == before
    assert leader.empty_leaf(0)
    assert store.sql(columns, opened) == before
    assert states(store) == {id_: "pending"}


def test_a_chunk_that_a_claim_holds_is_passed_over(store: Session, leader: Leader, open_session: OpenSession) -> None:
    enqueue(store, 10, chunk=5)
    claimer = Worker(open_session(), 1)
    close_leaf(leader)
    claimer.session.begin()
    claimer.claim(5, chunks=1)
    assert leader.one("move_chunks", 0, 10) == (1, 5)
    claimer.session.commit()
    assert leader.one("move_chunks", 0, 10) == (0, 0)


def test_delayed_tasks_take_their_content_with_them(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 3, payload=b"[7]")
    worker = Worker(store, 1)
    worker.claim(3)
    worker.fail(1, ids, 0.0)
    [[created_at]] = store.sql("SELECT DISTINCT created_at FROM fastq.task")
    opened = close_leaf(leader)
    assert leader.one("carry_delayed", 0, 2) == (2, 0)
    assert leader.one("carry_delayed", 0, 2) == (1, 0)
    assert leader.empty_leaf(0)
    assert store.sql("SELECT DISTINCT leaf, created_at, format::text, payload FROM fastq.delayed") == [
        (None, created_at, "j", b"[7]")
    ]
    leader.run("promote_tasks", 10, opened)
    assert store.sql("SELECT DISTINCT leaf, created_at, payload FROM fastq.task") == [(opened, created_at, b"[7]")]
    assert run_all(store, 2) == list(ids)


def test_a_delayed_task_that_somebody_holds_is_passed_over(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """Upkeep waits for nobody's transaction, and counts what it did."""
    ids = enqueue(store, 3)
    worker = Worker(store, 1)
    worker.claim(3)
    worker.fail(1, ids, 60.0)
    close_leaf(leader)
    other = open_session()
    other.begin()
    other.sql("SELECT FROM fastq.delayed WHERE id = $1 FOR UPDATE", ids[1])
    assert leader.one("carry_delayed", 0, 10) == (2, 0)
    assert leader.one("carry_delayed", 0, 10) == (0, 0)
    other.commit()
    assert leader.one("carry_delayed", 0, 10) == (1, 0)
    assert leader.empty_leaf(0)


def test_a_delayed_task_without_content_has_failed(store: Session, leader: Leader) -> None:
    """Somebody deleted its row by hand: it must not keep its leaf for ever, nor run with a payload that it never had."""
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    worker.fail(1, ids, 60.0)
    store.sql("DELETE FROM fastq.task WHERE id = $1", ids[0])
    close_leaf(leader)
    assert leader.one("carry_delayed", 0, 10) == (2, 1)
    assert states(store) == {ids[0]: "failed", ids[1]: "pending"}
    assert leader.empty_leaf(0)


def test_running_tasks_are_waited_for(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    close_leaf(leader)
    assert not clear(leader, 0)
    worker.complete({1: ids[:1]})
    assert not clear(leader, 0)
    worker.complete({1: ids[1:]})
    assert clear(leader, 0)


@pytest.mark.parametrize("state", ["ready", "claim", "delayed"])
def test_a_leaf_that_something_names_is_not_emptied(store: Session, leader: Leader, state: str) -> None:
    ids = enqueue(store, 3)
    worker = Worker(store, 1)
    if state != "ready":
        worker.claim(3)
    if state == "delayed":
        worker.fail(1, ids, 60.0)
    close_leaf(leader)
    assert not leader.empty_leaf(0)
    assert store.sql("SELECT count(*) FROM fastq.task_00") == [(3,)]


def test_a_late_commit_into_a_closed_leaf_is_waited_for_and_seen(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """The leaf is locked before it is asked who names it: asked first, the late commit lost its payload."""
    close_leaf(leader)
    late, observer = open_session(), open_session()
    late.begin()
    ids = enqueue(late, 3, leaf=0)
    # As long as it is open, the lock's time limit ends the attempt.
    with pytest.raises(psycopg.errors.LockNotAvailable):
        leader.empty_leaf(0)
    store.begin()
    with in_background(store, lambda: store.run("lock_leaf", leaf=0)) as lock:
        wait_blocked(observer, store)
        late.commit()
        lock.result(30)
    assert leader.one("check_leaf_empty", 0, 0.0) == (False,)
    store.rollback()
    assert clear(leader, 0)
    assert run_all(store, 1) == list(ids)


def test_a_writer_that_comes_while_a_leaf_is_emptied_writes_into_it_afterwards(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    close_leaf(leader)
    late, observer = open_session(), open_session()
    first = reserve(store, 3)
    store.begin()
    store.run("lock_leaf", leaf=0)
    assert leader.one("check_leaf_empty", 0, 0.0) == (True,)
    with in_background(late, lambda: enqueue(late, 3, leaf=0, first=first)) as writer:
        wait_blocked(observer, late)
        store.run("free_leaf", 0)
        store.run("truncate_leaf", leaf=0)
        store.commit()
        ids = writer.result(30)
    # The leaf counts as empty and holds tasks: nothing is lost, also when its turn comes again.
    assert states(store) == dict.fromkeys(ids, "pending")
    for _ in range(15):
        close_leaf(leader)
    assert leaf_states(store)[0] == "open"
    assert run_all(store, 1) == list(ids)


def test_claims_go_on_while_a_leaf_is_checked(store: Session, leader: Leader, open_session: OpenSession) -> None:
    """Only the truncation itself keeps readers out: the check reads all that waits, which may take a while."""
    ids = enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    waiting = enqueue(store, 3, leaf=1)
    store.begin()
    store.run("lock_leaf", leaf=0)
    other = Worker(open_session(), 2)
    other.session.sql("SET lock_timeout = '5s'")
    [chunk] = other.claim(3)
    assert chunk.ids == list(waiting)
    # And a failure, which looks its task up in all leaves.
    assert other.fail(chunk.no, waiting) == []
    store.rollback()
    assert set(states(store)) == {*ids, *waiting}


def test_truncation_gives_up_on_a_reader(store: Session, leader: Leader, open_session: OpenSession) -> None:
    ids = enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    reader = open_session()
    reader.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    assert reader.value("SELECT count(*) FROM fastq.task") == 3
    with pytest.raises(psycopg.errors.LockNotAvailable):
        leader.empty_leaf(0)
    assert states(store) == dict.fromkeys(ids, "completed")
    reader.rollback()
    assert leader.empty_leaf(0)


def test_who_waits_behind_a_truncation_waits_as_long_as_that_does(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """A reader's open transaction keeps the truncation waiting, and that the claims behind it: until its own limit is over."""
    enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    [waiting] = enqueue(store, 1, leaf=1)
    reader, claimer, observer = open_session(), open_session(), open_session()
    reader.begin()
    assert reader.value("SELECT count(*) FROM fastq.task_00") == 3
    worker = Worker(claimer, 2)
    store.begin()
    # Long enough to see what waits for whom; the engine's is LOCK_WAIT.
    store.sql("SET LOCAL lock_timeout = '3s'")
    store.run("lock_leaf", leaf=0)
    with in_background(store, lambda: store.run("truncate_leaf", leaf=0)) as truncation:
        wait_blocked(observer, store)
        with in_background(claimer, lambda: worker.claim(1)) as claim:
            wait_until(
                lambda: observer.value("SELECT $1 = ANY (pg_blocking_pids($2::integer))", store.pid, claimer.pid),
                message="a claim that waits for the truncation",
            )
            assert not claim.done()
            with pytest.raises(psycopg.errors.LockNotAvailable):
                truncation.result(30)
            store.rollback()
            # The reader is still there.
            [chunk] = claim.result(30)
    assert chunk.ids == [waiting]
    assert reader.value("SELECT count(*) FROM fastq.task_00") == 3
    reader.rollback()
    assert leader.empty_leaf(0)


def test_a_reader_of_completions_alone_keeps_no_claim_waiting(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """Claims read no completions: the truncation waits for their table first, and has then locked nothing that a claim reads."""
    enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    [waiting] = enqueue(store, 1, leaf=1)
    reader, claimer, observer = open_session(), open_session(), open_session()
    reader.begin()
    assert reader.value("SELECT count(*) FROM fastq.done_00") == 1
    worker = Worker(claimer, 2)
    claimer.sql("SET lock_timeout = '1ms'")
    store.begin()
    store.run("lock_leaf", leaf=0)
    with in_background(store, lambda: store.run("truncate_leaf", leaf=0)) as truncation:
        wait_blocked(observer, store)
        [chunk] = worker.claim(1)
        assert not truncation.done()
        reader.rollback()
        truncation.result(30)
    store.rollback()
    assert chunk.ids == [waiting]


def test_two_leaders_that_empty_one_leaf_do_not_deadlock(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    twin = Leader(open_session(), leader.id)
    twin.term = leader.term
    store.begin()
    store.run("lock_leaf", leaf=0)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        twin.empty_leaf(0)
    assert leader.one("check_leaf_empty", 0, 0.0) == (True,)
    store.run("free_leaf", 0)
    store.run("truncate_leaf", leaf=0)
    store.commit()
    assert not twin.empty_leaf(0)


def test_emptying_a_leaf_locks_that_leaf_alone(store: Session, leader: Leader) -> None:
    """DROP, DETACH and ATTACH would lock the parents against all."""
    enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    store.begin()
    store.run("lock_leaf", leaf=0)
    store.run("truncate_leaf", leaf=0)
    locked = store.sql(
        "SELECT c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
        "WHERE l.pid = pg_backend_pid() AND c.relkind IN ('r', 'p') AND c.relnamespace = $1::regnamespace "
        "AND l.mode = 'AccessExclusiveLock'",
        f'"{store.schema}"',
    )
    store.rollback()

    assert sorted(name for name, _ in locked) == ["done_00", "task_00"]


class Traffic:
    """A producer and a consumer, each with a connection of its own, that work until the ring has turned."""

    def __init__(self, producer: Session, consumer: Session) -> None:
        self.producer = producer
        self.consumer = consumer
        self.leaves: list[int] = []
        """Those that the producer wrote to, in order."""
        self.turned = False
        self.completed: list[int] = []

    def produce(self) -> list[int]:
        """A transaction for each leaf that is found open."""
        ids: list[int] = []
        leaf = -1

        def moved_on() -> bool:
            return self.turned or bool(self.producer.run("reserve_ids", 1)[0][2] != leaf)

        while not self.turned:
            [(lo, _, leaf)] = self.producer.run("reserve_ids", 1)
            ids += enqueue(self.producer, 50, first=lo, leaf=leaf, chunk=20)
            self.leaves.append(leaf)
            wait_until(moved_on)
        return ids

    def consume(self, produced: Callable[[], bool]) -> None:
        """Until all is produced and nothing is left. Every fifth claim fails in part, and is retried from wherever it is by then."""
        worker = Worker(self.consumer, 1)
        for turn in itertools.count():
            last = produced()
            chunks = worker.claim(70)
            self.finish(worker, chunks, fail=turn % 5 == 4)
            # One look at both: between two, a task moves from the one to the other; and a claim that finds nothing passes what is locked.
            if last and not self.consumer.sql("SELECT FROM fastq.ready UNION ALL SELECT FROM fastq.delayed LIMIT 1"):
                return

    def finish(self, worker: Worker, chunks: list[Chunk], *, fail: bool) -> None:
        for chunk in chunks:
            ids = list(range(chunk.lo, chunk.upto + 1))
            assert chunk.ids == ids, "a claim without its content"
            failed = ids[:2] if fail and chunk.attempts == 0 else []
            if failed:
                assert worker.fail(chunk.no, failed, 0.0) == []
            assert worker.complete({chunk.no: ids[len(failed) :]}) == {}
            self.completed += ids[len(failed) :]


def test_enqueue_claim_and_completion_go_on_while_the_ring_turns_twice(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """Nothing fails, nothing is lost and nothing runs twice while 32 leaves are opened, cleared and emptied."""
    traffic = Traffic(open_session(), open_session())
    opened, emptied = 0, 0
    with ThreadPoolExecutor(2) as pool:
        produced = pool.submit(traffic.produce)
        consumed = pool.submit(traffic.consume, produced.done)
        try:
            while not consumed.done():
                [[leaf]] = store.sql("SELECT no FROM fastq.leaf WHERE state = 'open'")
                leader.run("promote_tasks", 100, leaf)
                traffic.turned = opened == 32 or produced.done()
                if not traffic.turned and leaf in traffic.leaves[-1:]:
                    opened += len(leader.run("open_leaf", 0.0))
                for (closed,) in store.run("list_leaves_to_empty", 0.0):
                    with suppress(psycopg.errors.LockNotAvailable):
                        emptied += clear(leader, closed)
        finally:
            traffic.turned = True
        ids = produced.result(60)
        consumed.result(60)
    assert opened == 32
    assert emptied >= 17
    assert sorted(traffic.completed) == sorted(ids)
    assert set(states(store).values()) <= {"completed"}


def test_a_pinned_snapshot_is_no_reader_of_leaves(store: Session, leader: Leader, open_session: OpenSession) -> None:
    """A report elsewhere that never looked at tasks keeps no leaf."""
    enqueue(store, 3)
    run_all(store, 1)
    close_leaf(leader)
    report = open_session()
    report.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    report.value("SELECT 1")
    wait_until(lambda: store.value("SELECT backend_xmin IS NOT NULL FROM pg_stat_activity WHERE pid = $1", report.pid))
    assert leader.empty_leaf(0)
    report.rollback()
