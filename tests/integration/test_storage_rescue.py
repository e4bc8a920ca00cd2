"""Death and the leader: who is declared dead, what is charged for it, and who may do upkeep."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.storage import (
    Leader,
    Session,
    Worker,
    chunks_of,
    claims_of,
    delay,
    enqueue,
    in_background,
    states,
    wait_blocked,
)

OpenSession = Callable[[], Session]


@pytest.fixture
def leader(store: Session) -> Leader:
    """The one leader, with a long lease."""
    found = Leader(store)
    found.tick()
    assert found.term == 1
    return found


def lose(worker: Worker, leader: Leader, running: list[int], *, stopping: bool = False) -> None:
    """The worker beats once more, with what it runs then, and dies; its claims are rescued."""
    worker.beat(running, stopping=stopping)
    leader.declare_dead(worker)
    leader.rescue()
    leader.run("forget_consumers")


def attempts_of(store: Session) -> dict[int, int]:
    """What waits: id → runs charged."""
    return {id_: attempts for _, _, attempts, lo, hi in chunks_of(store) for id_ in range(lo, hi + 1)}


# --- rule 2: what a loss costs -------------------------------------------------------------------


def test_rule_2_a_loss_charges_what_ran_and_nothing_else(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    worker.claim(10)
    lose(worker, leader, [ids[2], ids[3]])
    assert attempts_of(store) == {id_: int(id_ in (ids[2], ids[3])) for id_ in ids}
    assert store.sql("SELECT id, attempt, took_us FROM fastq.attempt_error ORDER BY id") == [
        (ids[2], 1, None),
        (ids[3], 1, None),
    ]
    [[error]] = store.sql("SELECT DISTINCT error FROM fastq.attempt_error")
    assert "process 1 on host" in error


def test_rule_2_each_loss_makes_the_next_run_more_careful(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store, max_attempts=10)
    seen = []
    for worker_id in range(1, 5):
        worker = Worker(store, worker_id)
        [chunk] = worker.claim(1)
        seen.append((chunk.track, chunk.attempts))
        lose(worker, leader, [])
    # Track 0: prefetched, not charged. Then (2) into free slots only and (3) alone: claimed is started, so charged.
    assert seen == [(0, 0), (2, 0), (3, 1), (3, 2)]
    assert attempts_of(store) == {id_: 3}


def test_rule_2_with_one_attempt_left_the_next_run_is_alone_at_once(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store, max_attempts=2)
    worker = Worker(store, 1)
    worker.claim(1)
    lose(worker, leader, [id_])
    assert [(track, attempts) for track, _, attempts, *_ in chunks_of(store)] == [(3, 1)]


def test_rule_2_a_task_that_kills_its_process_runs_out_of_attempts(store: Session, leader: Leader) -> None:
    killer, *neighbours = enqueue(store, 10, max_attempts=3)
    for worker_id in range(1, 30):
        worker = Worker(store, worker_id)
        # A worker takes what must run alone by itself, and else all that it finds.
        chunks = worker.claim(1, tracks=(3,)) or worker.claim(10, tracks=(2, 1, 0))
        held = {id_: chunk.no for chunk in chunks for id_ in range(chunk.lo, chunk.upto + 1)}
        if killer in held:
            lose(worker, leader, [killer])
        else:
            worker.complete({no: [id_ for id_, of in held.items() if of == no] for no in set(held.values())})
    assert states(store) == {killer: "failed"} | dict.fromkeys(neighbours, "completed")
    [(attempts, payload)] = store.sql("SELECT attempts, payload FROM fastq.dead")
    assert (attempts, payload) == (3, b'{"n":1}')
    errors = store.sql("SELECT attempt FROM fastq.attempt_error WHERE id = $1 ORDER BY attempt", killer)
    assert errors == [(1,), (2,), (3,)]


def test_rule_2_a_worker_told_to_stop_makes_nothing_more_careful(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 4)
    worker = Worker(store, 1)
    worker.claim(4)
    lose(worker, leader, [ids[0]], stopping=True)
    assert sorted(chunks_of(store)) == [(1, 0, 0, ids[1], ids[3]), (1, 0, 1, ids[0], ids[0])]


def test_rule_2_an_end_other_than_loss_makes_the_next_run_ordinary_again(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store, max_attempts=5)
    worker = Worker(store, 1)
    worker.claim(1)
    lose(worker, leader, [id_])
    again = Worker(store, 2)
    [chunk] = again.claim(1)
    assert chunk.track == 2
    again.fail(chunk.no, [id_], 0.0)
    leader.run("promote_tasks", 100, 0)
    assert chunks_of(store) == [(0, 0, 2, id_, id_)]


# --- rule 3: who is dead -------------------------------------------------------------------------


def test_rule_3_a_beating_worker_keeps_its_claim_however_old_it_is(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    store.sql("UPDATE fastq.claim SET claimed_at = claimed_at - interval '1 year'")
    assert worker.beat(ids) == (True, [1])
    assert leader.run("declare_dead", 9.0) == []
    assert leader.rescue() == []
    assert claims_of(store) == {(1, 1): list(ids)}


def test_rule_3_a_silent_worker_is_found_and_its_tasks_run_again(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    store.sql("UPDATE fastq.consumer SET beat_at = beat_at - interval '10 seconds'")
    assert leader.tick()["silent"] is True
    [(id_, host, pid, silent)] = leader.run("declare_dead", 9.0)
    assert (id_, host, pid) == (1, "host", 1)
    assert silent >= 10
    found = leader.tick()
    assert (found["silent"], found["orphaned"], found["dead"]) == (False, True, True)
    assert leader.rescue() == [(1, "host", 1, 1, 2, 0, 0)]
    leader.run("forget_consumers")
    found = leader.tick()
    assert (found["orphaned"], found["dead"]) == (False, False)
    assert states(store) == dict.fromkeys(ids, "pending")


def test_rule_3_a_worker_that_was_declared_dead_is_told_at_its_next_beat(store: Session, leader: Leader) -> None:
    worker = Worker(store, 1)
    leader.declare_dead(worker)
    assert worker.beat()[0] is False
    leader.run("forget_consumers")
    assert worker.beat()[0] is False


def test_what_was_claimed_while_its_worker_was_declared_dead_is_rescued(store: Session, leader: Leader) -> None:
    """A zombie's claim may commit after its worker was forgotten: a claim of an unknown consumer is rescued as well."""
    ids = enqueue(store, 3)
    zombie = Worker(store, 1)
    leader.declare_dead(zombie)
    leader.run("forget_consumers")
    assert len(zombie.claim(3)) == 1
    assert leader.tick()["orphaned"] is True
    [(consumer, host, pid, _, tasks, *_)] = leader.rescue()
    assert (consumer, host, pid, tasks) == (1, None, None, 3)
    assert states(store) == dict.fromkeys(ids, "pending")


def test_a_dead_worker_is_not_forgotten_while_it_holds_something(store: Session, leader: Leader) -> None:
    enqueue(store, 3)
    worker = Worker(store, 1)
    worker.claim(3)
    leader.declare_dead(worker)
    leader.run("forget_consumers")
    assert store.sql("SELECT id FROM fastq.consumer") == [(1,)]
    leader.rescue()
    leader.run("forget_consumers")
    assert store.sql("SELECT id FROM fastq.consumer") == []


def test_a_worker_that_leaves_in_order_is_gone_at_once_or_left_to_the_rescuer(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2)
    idle, busy = Worker(store, 1), Worker(store, 2)
    busy.claim(2)
    store.run("unregister_consumer", idle.id, "{}")
    store.run("unregister_consumer", busy.id, f"{{[{ids[0]},{ids[1]})}}")
    assert store.sql("SELECT id, stopping FROM fastq.consumer WHERE dead_at IS NOT NULL") == [(2, True)]
    leader.rescue()
    # What ran is charged, but nothing becomes more careful: the worker had been told to stop.
    assert sorted(chunks_of(store)) == [(1, 0, 0, ids[1], ids[1]), (1, 0, 1, ids[0], ids[0])]


def test_a_rescue_takes_a_bounded_number_of_claims(store: Session, leader: Leader) -> None:
    worker = Worker(store, 1)
    for _ in range(3):
        enqueue(store, 2)
        worker.claim(2)
    leader.declare_dead(worker)
    assert leader.rescue(2) == [(1, "host", 1, 2, 4, 0, 0)]
    assert leader.rescue(2) == [(1, "host", 1, 1, 2, 0, 0)]


def test_a_rescue_passes_over_a_claim_that_is_being_flushed(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    """The dying worker's last flush is on its way: it decides what is left, and the rescue comes back for that."""
    ids = enqueue(store, 4)
    dying = Worker(open_session(), 1)
    dying.claim(4)
    leader.declare_dead(dying)
    dying.session.begin()
    assert dying.complete({1: ids[:3]}) == {}
    assert leader.rescue() == []
    dying.session.commit()
    assert leader.rescue() == [(1, "host", 1, 1, 1, 0, 0)]
    assert states(store) == dict.fromkeys(ids[:3], "completed") | {ids[3]: "pending"}


def test_a_flush_that_waits_for_a_rescue_is_refused(store: Session, leader: Leader, open_session: OpenSession) -> None:
    ids = enqueue(store, 4)
    dying = Worker(open_session(), 1)
    dying.claim(4)
    leader.declare_dead(dying)
    store.begin()
    leader.rescue()
    with in_background(dying.session, lambda: dying.complete({1: ids})) as late:
        wait_blocked(open_session(), dying.session)
        store.commit()
        assert late.result(30) == {1: list(ids)}
    assert states(store) == dict.fromkeys(ids, "pending")


# --- the lease -----------------------------------------------------------------------------------


def expire(store: Session) -> None:
    """The lease ran out a minute ago."""
    store.sql("UPDATE fastq.leader SET expires_at = clock_timestamp() - interval '1 minute'")


def test_the_first_to_tick_leads(store: Session) -> None:
    first, second = Leader(store, 1), Leader(store, 2)
    assert first.tick()["term"] == 1
    assert second.tick()["term"] is None


def test_a_renewal_keeps_the_term_and_a_takeover_raises_it(store: Session) -> None:
    first, second = Leader(store, 1), Leader(store, 2)
    first.tick()
    store.sql("UPDATE fastq.leader SET expires_at = clock_timestamp() + interval '1 minute'")
    assert first.tick()["term"] == 1
    left = store.value("SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM fastq.leader")
    assert left > 500
    expire(store)
    assert second.tick()["term"] == 2
    assert first.tick()["term"] is None


def test_a_leader_that_lost_its_lease_meanwhile_gets_a_new_term(store: Session) -> None:
    """Nobody else led, but somebody might have: what it still has under way must not pass for the new term's."""
    leader = Leader(store, 1)
    leader.tick()
    expire(store)
    assert leader.tick()["term"] == 2


def test_a_lease_with_time_left_is_not_written_again(store: Session) -> None:
    """A tick of each consumer each second must not leave a dead row each."""
    leader, other = Leader(store, 1), Leader(store, 2)
    leader.tick()
    before = store.value("SELECT xmin::text FROM fastq.leader")
    for _ in range(3):
        leader.tick()
        other.tick()
    assert store.value("SELECT xmin::text FROM fastq.leader") == before


def test_of_two_that_take_an_expired_lease_one_gets_it(store: Session, open_session: OpenSession) -> None:
    Leader(store, 1).tick()
    expire(store)
    first, second = Leader(open_session(), 2), Leader(open_session(), 3)
    first.session.begin()
    assert first.tick()["term"] == 2
    with in_background(second.session, second.tick) as late:
        wait_blocked(store, second.session)
        first.session.commit()
        assert late.result(30)["term"] is None
    assert store.sql("SELECT holder, term FROM fastq.leader") == [(2, 2)]


def test_of_two_that_take_the_very_first_lease_one_gets_it(store: Session, open_session: OpenSession) -> None:
    first, second = Leader(open_session(), 2), Leader(open_session(), 3)
    first.session.begin()
    assert first.tick()["term"] == 1
    with in_background(second.session, second.tick) as late:
        wait_blocked(store, second.session)
        first.session.commit()
        assert late.result(30)["term"] is None


def test_a_leader_that_leaves_lets_another_lead_at_once(store: Session) -> None:
    first, second = Leader(store, 1), Leader(store, 2)
    first.tick()
    first.run("resign_leader")
    assert second.tick()["term"] == 2


@pytest.mark.parametrize("stale", ["holder", "term"])
def test_a_deposed_leader_does_no_upkeep(store: Session, stale: str) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(1)
    delay(store, [5_000_001], 0.0)
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp(), beat_at = beat_at - interval '1 hour'")
    store.sql(
        "INSERT INTO fastq.consumer (id, pid, host, version, types, dead_at) VALUES (5, 1, 'h', '0', '{}', clock_timestamp())"
    )
    leader = Leader(store)
    leader.tick()
    if stale == "holder":
        leader.id += 1
    else:
        leader.term -= 1
    before = store.sql("SELECT id, state FROM fastq.tasks ORDER BY id")
    assert leader.run("declare_dead", 9.0) == []
    assert leader.rescue() == []
    leader.run("promote_tasks", 10, 0)
    leader.run("forget_consumers")
    assert leader.run("open_leaf", 0.0) == []
    store.sql("UPDATE fastq.leaf SET state = 'closed', closed_at = opened_at WHERE state = 'open'")
    store.sql("UPDATE fastq.leaf SET state = 'open', opened_at = clock_timestamp() WHERE no = 1")
    assert leader.one("move_chunks", 0, 10) == (0, 0)
    assert leader.one("carry_delayed", 0, 10) == (0, 0)
    assert leader.one("check_leaf_empty", 3, 0.0) == (False,)
    assert leader.one("purge_dead", 0.0, 10) == (0,)
    assert leader.one("purge_errors", 0.0, 0, 10)[0] == 0
    assert leader.one("purge_tokens", 0.0, "", "", 10)[0] == 0
    assert store.sql("SELECT id, state FROM fastq.tasks ORDER BY id") == before
    assert len(store.sql("SELECT FROM fastq.consumer")) == 2
    assert claims_of(store) == {(1, 1): [ids[0]]}


def test_two_leaders_at_once_rescue_each_claim_once(store: Session, open_session: OpenSession) -> None:
    """The leader saves work; it never makes a move safe: locks of rows decide."""
    ids = enqueue(store, 6, chunk=2)
    workers = [Worker(store, id_) for id_ in (1, 2, 3)]
    for worker in workers:
        worker.claim(2)
    leader = Leader(store)
    leader.tick()
    leader.declare_dead(*workers)
    twin = Leader(open_session(), leader.id)
    twin.term = leader.term
    store.begin()
    assert sum(row[4] for row in leader.rescue(2)) == 4
    assert sum(row[4] for row in twin.rescue()) == 2
    store.commit()
    assert attempts_of(store) == dict.fromkeys(ids, 0)
    assert claims_of(store) == {}


def test_two_leaders_at_once_promote_each_task_once(store: Session, open_session: OpenSession) -> None:
    ids = range(1, 21)
    delay(store, ids, 0.0)
    leader = Leader(store)
    leader.tick()
    twin = Leader(open_session(), leader.id)
    twin.term = leader.term
    store.begin()
    assert leader.one("promote_tasks", 8, 0)[0] == 8
    assert twin.one("promote_tasks", 100, 0)[0] == 12
    store.commit()
    assert attempts_of(store) == dict.fromkeys(ids, 0)
    assert states(store) == dict.fromkeys(ids, "pending")


def test_two_leaders_at_once_open_one_leaf(store: Session, open_session: OpenSession) -> None:
    leader = Leader(store)
    leader.tick()
    twin = Leader(open_session(), leader.id)
    twin.term = leader.term
    store.begin()
    assert leader.run("open_leaf", 0.0) == [(1,)]
    with in_background(twin.session, lambda: twin.run("open_leaf", 0.0)) as late:
        wait_blocked(open_session(), twin.session)
        store.commit()
        assert late.result(30) == []
    assert store.sql("SELECT no FROM fastq.leaf WHERE state = 'open'") == [(1,)]


def test_a_tick_tells_what_there_is_to_do(store: Session) -> None:
    leader = Leader(store)
    found = leader.tick()
    assert (found["last_lane"], found["open_leaf"], found["due_in"]) == (1, 0, None)
    assert (found["silent"], found["orphaned"], found["dead"], found["careful_lanes"]) == (False, False, False, [])
    delay(store, [1], 60.0)
    assert 50 < leader.tick()["due_in"] <= 60
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    worker.claim(1)
    lose(worker, leader, [id_])
    assert leader.tick()["careful_lanes"] == [1]
