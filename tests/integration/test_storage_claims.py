"""Claiming, completing, failing, giving back: each rule and race of the storage design that SQL alone decides."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.support.storage import (
    Leader,
    Session,
    Worker,
    add_lane,
    chunks_of,
    claims_of,
    delay,
    done_ids,
    enqueue,
    ids_of,
    in_background,
    states,
    wait_blocked,
)

OpenSession = Callable[[], Session]


def flat(held: dict[int, list[int]]) -> list[int]:
    return [id_ for ids in held.values() for id_ in ids]


def claimed_ids(worker: Worker, n: int = 1000, lanes: tuple[int, ...] = (1,)) -> dict[int, list[int]]:
    """Claims, and gives claim → ids."""
    held: dict[int, list[int]] = {}
    for chunk in worker.claim(n, lanes):
        held.setdefault(chunk.no, []).extend(range(chunk.lo, chunk.upto + 1))
    return held


# --- claim ---------------------------------------------------------------------------------------


def test_a_claim_brings_the_content_of_every_task_in_order(store: Session) -> None:
    ids = enqueue(store, 700, payload=b"[1]")
    chunks = Worker(store, 1).claim(1000)
    assert [(chunk.lo, chunk.upto) for chunk in chunks] == [(ids[0], ids[499]), (ids[500], ids[699])]
    for chunk in chunks:
        assert chunk.ids == list(range(chunk.lo, chunk.upto + 1))
        assert chunk.payloads == [b"[1]"] * len(chunk.ids)
    assert claims_of(store) == {(1, 1): list(ids)}
    assert chunks_of(store) == []


def test_a_claim_shrinks_the_last_chunk_from_its_low_end(store: Session) -> None:
    ids = enqueue(store, 500)
    [chunk] = Worker(store, 1).claim(120)
    assert (chunk.lo, chunk.upto, chunk.shrunk) == (ids[0], ids[119], True)
    assert chunks_of(store) == [(0, 0, 0, ids[120], ids[499])]


def test_shrinking_a_chunk_is_a_hot_update(store: Session) -> None:
    enqueue(store, 500)
    worker = Worker(store, 1)
    for _ in range(5):
        worker.claim(50)
    # The counts are this backend's own, seen at once inside a transaction.
    store.begin()
    worker.claim(50)
    updates = store.value(
        "SELECT array[pg_stat_get_xact_tuples_updated('fastq.ready'::regclass), "
        "pg_stat_get_xact_tuples_hot_updated('fastq.ready'::regclass)]"
    )
    store.rollback()
    assert updates[0] == updates[1] > 0


def test_lanes_are_claimed_in_the_order_asked_for(store: Session) -> None:
    urgent = add_lane(store, priority=9)
    later, first = enqueue(store, 10), enqueue(store, 10, lane=urgent)
    worker = Worker(store, 1)
    assert flat(claimed_ids(worker, 15, (urgent, 1))) == [*first, *later[:5]]


def test_a_claim_answers_in_the_order_of_places(store: Session) -> None:
    """Whatever leaves and claims its chunks fall into: what was enqueued first starts first."""
    urgent = add_lane(store, priority=9)
    ids = [enqueue(store, 5, lane=1 + n % 2, leaf=n % 3, max_attempts=1 + n % 4)[0] for n in range(24)]
    chunks = Worker(store, 1).claim(1000, (urgent, 1))
    assert [chunk.lo for chunk in chunks] == ids[1::2] + ids[::2]


def test_a_claim_takes_only_the_lanes_asked_for(store: Session) -> None:
    other = add_lane(store, "other")
    enqueue(store, 10, lane=other)
    assert Worker(store, 1).claim(10, (1,)) == []


def test_lanes_of_a_group_share_one_limit(store: Session) -> None:
    b, c = add_lane(store, "b"), add_lane(store, "c")
    for lane in (1, b, c):
        enqueue(store, 10, lane=lane)
    worker = Worker(store, 1)
    # Lanes 1 and b belong to one type with six free slots, c to another with three.
    rows = store.run(
        "claim_tasks", worker.id, 0, 100, 1 << 20, [1, b, c], [0] * 3, [0] * 3, [0, 0, 1], [6, 6, 3], [9] * 3, 9
    )
    assert [(lane, upto - lo + 1) for _, lane, _, _, _, _, _, lo, upto, *_ in rows] == [(1, 6), (c, 3)]


def test_a_claim_stops_at_its_limit_of_bytes_but_takes_one(store: Session) -> None:
    ids = enqueue(store, 10, payload=b"x" * 1000)
    worker = Worker(store, 1)
    [chunk] = worker.claim(10, byte_limit=2500)
    assert (chunk.lo, chunk.upto) == (ids[0], ids[1])
    [chunk] = worker.claim(10, byte_limit=10)
    assert (chunk.lo, chunk.upto) == (ids[2], ids[2])


def test_a_claim_locks_no_more_chunks_than_it_may(store: Session, open_session: OpenSession) -> None:
    enqueue(store, 100, chunk=10)
    store.begin()
    assert len(Worker(store, 1, register=False).claim(1000, chunks=3)) == 3
    # The next consumer finds the rest, though the first has not committed.
    assert len(Worker(open_session(), 2).claim(1000)) == 7
    store.rollback()


def test_the_hint_skips_and_a_sweep_finds_what_lies_behind_it(store: Session) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    [rid] = store.sql("SELECT rid FROM fastq.ready")[0]
    assert worker.claim(10, hint=rid + 1) == []
    [chunk] = worker.claim(10, hint=0)
    assert (chunk.lo, chunk.upto) == (ids[0], ids[-1])


def test_two_claimers_of_one_chunk_never_share_a_task(
    store: Session, open_session: OpenSession, request: pytest.FixtureRequest
) -> None:
    """The chunk is shrunk between the second claimer's snapshot and its lock: it takes what the row holds now."""
    ids = enqueue(store, 500)
    let_go = request.getfixturevalue("late_claim")
    assert claimed_ids(Worker(open_session(), 1), 100) == {1: list(ids[:100])}
    assert let_go() == [(ids[100], ids[199])]
    assert chunks_of(store) == [(0, 0, 0, ids[200], ids[499])]
    assert claims_of(store) == {(1, 1): list(ids[:100]), (2, 1): list(ids[100:200])}


def test_a_chunk_taken_whole_between_snapshot_and_lock_is_not_taken_twice(
    store: Session, open_session: OpenSession, request: pytest.FixtureRequest
) -> None:
    ids = enqueue(store, 500)
    let_go = request.getfixturevalue("late_claim")
    assert claimed_ids(Worker(open_session(), 1), 500) == {1: list(ids)}
    assert let_go() == []
    assert claims_of(store) == {(1, 1): list(ids)}


def test_a_chunk_that_moved_to_another_leaf_is_not_claimed_without_its_content(
    store: Session, open_session: OpenSession, request: pytest.FixtureRequest
) -> None:
    """Born again in the new leaf: an older snapshot does not see it, and the next claim finds it with all it holds."""
    ids = enqueue(store, 50)
    leader = Leader(open_session())
    leader.tick()
    let_go = request.getfixturevalue("late_claim")
    assert leader.one("open_leaf", 0.0) == (1,)
    assert leader.one("move_chunks", 0, 10) == (1, 50)
    assert let_go() == []
    [chunk] = Worker(store, 3).claim(100)
    assert (chunk.leaf, chunk.ids) == (1, list(ids))


# --- complete ------------------------------------------------------------------------------------


def test_completing_all_of_a_claim_deletes_it(store: Session) -> None:
    ids = enqueue(store, 600)
    worker = Worker(store, 1)
    held = claimed_ids(worker)
    assert worker.complete(held) == {}
    assert claims_of(store) == {}
    assert done_ids(store) == list(ids)
    assert set(states(store).values()) == {"completed"}


def test_a_claim_is_completed_in_parts(store: Session) -> None:
    ids = enqueue(store, 20)
    worker = Worker(store, 1)
    claimed_ids(worker)
    assert worker.complete({1: ids[::2]}) == {}
    assert claims_of(store) == {(1, 1): list(ids[1::2])}
    assert worker.complete({1: ids[1::2]}) == {}
    assert claims_of(store) == {}
    assert done_ids(store) == list(ids)


def test_rows_of_completed_tasks_span_less_than_1024(store: Session) -> None:
    enqueue(store, 3000)
    worker = Worker(store, 1)
    worker.complete(claimed_ids(worker, 3000))
    spans = [(lo, ids_of(ids)) for lo, ids in store.sql("SELECT lo, ids FROM fastq.done")]
    assert all(lo == ids[0] and ids[-1] - lo < 1024 for lo, ids in spans)
    assert sum(len(ids) for _, ids in spans) == 3000


def test_two_flushes_of_one_claim_both_count(store: Session, open_session: OpenSession) -> None:
    """The second waits for the first's lock and decides on the row as it is then: on its snapshot it was lost."""
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    claimed_ids(worker)
    other = open_session()
    second = Worker(other, 1, register=False)
    store.begin()
    worker.complete({1: ids[:5]})
    with in_background(other, lambda: second.complete({1: ids[5:]})) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == {}
    assert claims_of(store) == {}
    assert done_ids(store) == list(ids)


def test_a_flush_and_a_give_back_of_one_claim_both_count(store: Session, open_session: OpenSession) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    claimed_ids(worker)
    other = open_session()
    store.begin()
    worker.give_back({1: ids[:5]})
    with in_background(other, lambda: Worker(other, 1, register=False).complete({1: ids})) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == {1: list(ids[:5])}
    assert chunks_of(store) == [(1, 0, 0, ids[0], ids[4])]
    assert done_ids(store) == list(ids[5:])


def test_flushes_of_the_same_claims_in_different_order_do_not_deadlock(
    store: Session, open_session: OpenSession
) -> None:
    """Claims are locked in the order of their numbers, whatever the order in which they were sent."""
    worker = Worker(store, 1)
    for _ in range(2):
        enqueue(store, 10)
        claimed_ids(worker)
    (one, first), (two, second) = sorted((no, ids) for (_, no), ids in claims_of(store).items())
    gate, other = open_session(), open_session()
    gate.begin()
    gate.sql("SELECT FROM fastq.claim WHERE no = $1 FOR UPDATE", two)
    late = Worker(other, 1, register=False)
    with in_background(other, lambda: late.complete({two: second[:5], one: first[:5]})) as flush:
        wait_blocked(store, other)
        # It waits for the second and so must hold the first already.
        assert store.sql("SELECT FROM fastq.claim WHERE no = $1 FOR UPDATE SKIP LOCKED", one) == []
        gate.commit()
        assert flush.result(30) == {}


# --- rule 1: fencing -----------------------------------------------------------------------------


def lose_to_another(store: Session, stale: Worker, ids: range) -> Worker:
    """`stale` claims, dies, is rescued, and another worker runs the tasks; gives that one."""
    assert claimed_ids(stale) == {1: list(ids)}
    leader = Leader(store)
    leader.tick()
    leader.declare_dead(stale)
    leader.rescue()
    other = Worker(store, stale.id + 1)
    assert flat(claimed_ids(other)) == list(ids)
    return other


def test_rule_1_a_stale_worker_cannot_complete_a_later_run(store: Session) -> None:
    ids = enqueue(store, 10)
    stale = Worker(store, 1)
    other = lose_to_another(store, stale, ids)
    assert stale.complete({1: ids}) == {1: list(ids)}
    assert done_ids(store) == []
    assert claims_of(store) == {(other.id, 1): list(ids)}


def test_rule_1_a_stale_worker_cannot_fail_a_later_run(store: Session) -> None:
    ids = enqueue(store, 3)
    stale = Worker(store, 1)
    lose_to_another(store, stale, ids)
    assert stale.fail(1, ids, 1.0) == list(ids)
    assert stale.fail(1, ids, None) == list(ids)
    assert set(states(store).values()) == {"running"}
    assert store.sql("SELECT FROM fastq.attempt_error WHERE error LIKE 'ValueError%'") == []


def test_rule_1_a_stale_worker_cannot_give_back_a_later_run(store: Session) -> None:
    ids = enqueue(store, 3)
    stale = Worker(store, 1)
    lose_to_another(store, stale, ids)
    assert stale.give_back({1: ids}) == {1: list(ids)}
    assert chunks_of(store) == []


def test_rule_1_a_result_sent_twice_counts_once(store: Session) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    held = claimed_ids(worker)
    assert worker.complete(held) == {}
    assert worker.complete(held) == {1: list(ids)}
    assert done_ids(store) == list(ids)


def test_a_flush_in_doubt_is_found_by_consumer_and_claim(store: Session) -> None:
    ids = enqueue(store, 4)
    worker = Worker(store, 1)
    claimed_ids(worker)
    worker.complete({1: ids[:2]})
    worker.fail(1, ids[2:3], 60.0)
    asked = (list(ids), [1] * 4)
    assert store.run("find_ended_tasks", 1, asked[1], asked[0]) == [(1, id_) for id_ in ids[:3]]
    # Another consumer's, or another claim's, is not ours.
    assert store.run("find_ended_tasks", 2, asked[1], asked[0]) == []
    assert store.run("find_ended_tasks", 1, [2] * 4, asked[0]) == []


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_attempt_is_charged_and_waits_for_its_retry(store: Session) -> None:
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    claimed_ids(worker)
    assert worker.fail(1, [id_], 30.0) == []
    assert claims_of(store) == {}
    [(attempts, kind, due)] = store.sql(
        "SELECT attempts, kind, run_at - clock_timestamp() FROM fastq.delayed WHERE id = $1", id_
    )
    assert (attempts, kind) == (1, "retrying")
    assert 25 < due.total_seconds() <= 30
    assert store.sql("SELECT attempt, error, consumer, no, took_us FROM fastq.attempt_error") == [
        (1, "ValueError: no", 1, 1, 5)
    ]


def test_a_final_failure_keeps_its_payload(store: Session) -> None:
    [id_] = enqueue(store, payload=b"[42]")
    worker = Worker(store, 1)
    claimed_ids(worker)
    worker.fail(1, [id_])
    assert store.sql("SELECT id, state, attempts, max_attempts, format::text, payload FROM fastq.dead") == [
        (id_, "failed", 1, 3, "j", b"[42]")
    ]
    assert states(store) == {id_: "failed"}


def test_failures_of_one_flush_leave_the_rest_of_the_claim(store: Session) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    claimed_ids(worker)
    assert worker.fail(1, [ids[3], ids[7], 999_999], 1.0) == [999_999]
    assert claims_of(store) == {(1, 1): [id_ for id_ in ids if id_ not in (ids[3], ids[7])]}


# --- give back -----------------------------------------------------------------------------------


def test_what_is_given_back_goes_to_the_front_and_is_not_charged(store: Session) -> None:
    ids = enqueue(store, 5)
    worker = Worker(store, 1)
    claimed_ids(worker)
    behind = enqueue(store, 5)
    assert worker.give_back({1: ids}) == {}
    assert chunks_of(store) == [(1, 0, 0, ids[0], ids[-1]), (0, 0, 0, behind[0], behind[-1])]
    assert list(claimed_ids(Worker(store, 2), 5).values()) == [list(ids)]


def test_holes_make_chunks_of_their_own(store: Session) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    claimed_ids(worker)
    worker.complete({1: [ids[4]]})
    worker.give_back({1: [id_ for id_ in ids if id_ != ids[4]]})
    assert [(lo, hi) for *_, lo, hi in chunks_of(store)] == [(ids[0], ids[3]), (ids[5], ids[9])]


def test_a_claim_whose_answer_was_lost_is_found_by_the_beat_and_given_back(store: Session) -> None:
    ids = enqueue(store, 5)
    worker = Worker(store, 1)
    claimed_ids(worker)
    assert worker.beat() == (True, [1])
    assert [(no, ids_of(found)) for no, found in store.run("read_claims", 1, [1, 99])] == [(1, list(ids))]
    assert worker.give_back({1: ids}) == {}
    assert worker.beat() == (True, [])
    assert chunks_of(store) == [(1, 0, 0, ids[0], ids[-1])]


# --- rules 3 to 5 --------------------------------------------------------------------------------


def test_rule_4_times_are_the_databases(store: Session) -> None:
    before = store.value("SELECT clock_timestamp()")
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    claimed_ids(worker)
    worker.complete({1: [id_]})
    after = store.value("SELECT clock_timestamp()")
    [[created_at]] = store.sql("SELECT created_at FROM fastq.task")
    [[done_at]] = store.sql("SELECT done_at FROM fastq.done")
    assert before <= created_at <= done_at <= after


def test_an_enqueue_in_doubt_waits_for_its_first_try_and_is_told_apart(
    store: Session, open_session: OpenSession
) -> None:
    """Sent again while the first try is under way: the leaf's unique index waits for it, and 23505 means it committed."""
    first = open_session()
    first.begin()
    ids = enqueue(first, 3)
    again = open_session()
    with in_background(again, lambda: enqueue(again, 3, first=ids[0])) as late:
        wait_blocked(store, again)
        assert store.run("find_enqueued", list(ids)) == []
        first.commit()
        with pytest.raises(psycopg.errors.UniqueViolation):
            late.result(30)
    found = store.run("find_enqueued", [*ids, 999_999])
    assert sorted(id_ for id_, *_ in found) == list(ids)
    assert states(store) == dict.fromkeys(ids, "pending")


def test_blocks_of_ids_are_never_handed_out_twice(store: Session, open_session: OpenSession) -> None:
    other = open_session()
    seen = [store.run("reserve_ids", 3), other.run("reserve_ids", 1), store.run("reserve_ids", 1)]
    blocks = [row[0] for rows in seen for row in rows]
    assert sorted(blocks) == list(range(blocks[0], blocks[0] + 5000, 1000))


def test_missing_content_is_told_apart_by_a_second_look(store: Session) -> None:
    ids = enqueue(store, 3)
    store.sql("DELETE FROM fastq.task WHERE id = $1", ids[1])
    [chunk] = Worker(store, 1).claim(3)
    assert chunk.ids == [ids[0], ids[2]]
    assert (chunk.lo, chunk.upto) == (ids[0], ids[2])
    assert store.run("read_tasks", 0, [ids[1]]) == []


def test_the_view_shows_each_task_once_in_every_state(store: Session) -> None:
    ids = enqueue(store, 8, chunk=1)
    worker = Worker(store, 1)
    held = {id_: no for no, taken in claimed_ids(worker, 6).items() for id_ in taken}
    worker.complete({held[ids[0]]: [ids[0]]})
    worker.fail(held[ids[1]], [ids[1]], 60.0)
    worker.fail(held[ids[2]], [ids[2]])
    worker.give_back({held[ids[3]]: [ids[3]]})
    scheduled = 5_000_001
    delay(store, [scheduled], 60.0)
    assert states(store) == {
        ids[0]: "completed",
        ids[1]: "pending",
        ids[2]: "failed",
        ids[3]: "pending",
        ids[4]: "running",
        ids[5]: "running",
        ids[6]: "pending",
        ids[7]: "pending",
        scheduled: "pending",
    }
    kinds: dict[int, str] = dict(store.sql("SELECT id, kind FROM fastq.tasks WHERE kind IS NOT NULL"))
    assert kinds == {ids[1]: "retrying", scheduled: "scheduled"}
