"""Death: who is declared dead, what is charged for it, and what becomes of the tasks."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.storage import (
    Leader,
    Session,
    Worker,
    chunks_of,
    claims_of,
    done_ids,
    enqueue,
    ids_of,
    in_background,
    multirange,
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
    # Not named as running on track 0 and 2: not charged, but the second time with a debt (track 4), which it pays when it is lost again:
    # alone, so that nothing else was to blame.
    assert seen == [(0, 0), (2, 0), (4, 0), (3, 2)]
    assert attempts_of(store) == {id_: 3}
    errors = store.sql("SELECT attempt, error LIKE '%lost again, alone%' FROM fastq.attempt_error ORDER BY attempt")
    assert errors == [(1, True), (2, False), (3, False)]


def test_rule_2_what_the_last_beat_named_is_charged_on_every_track_and_owes_nothing(
    store: Session, leader: Leader
) -> None:
    [id_] = enqueue(store, max_attempts=10)
    seen = []
    for worker_id in range(1, 5):
        worker = Worker(store, worker_id)
        [chunk] = worker.claim(1)
        seen.append((chunk.track, chunk.attempts))
        lose(worker, leader, [id_])
    assert seen == [(0, 0), (2, 1), (3, 2), (3, 3)]


def test_rule_2_a_debt_never_charges_more_runs_than_a_task_has(store: Session, leader: Leader) -> None:
    [id_] = enqueue(store, max_attempts=1)
    store.sql("UPDATE fastq.ready SET track = 4")
    worker = Worker(store, 1)
    worker.claim(1)
    lose(worker, leader, [])
    assert store.sql("SELECT id, attempts FROM fastq.dead") == [(id_, 1)]
    assert store.sql("SELECT attempt FROM fastq.attempt_error") == [(1,)]


def _work_off(rnd: random.Random, bad: set[int], waiting: list[int]) -> tuple[list[int], list[int], list[int] | None]:
    """A process with eight slots and these claimed: what it starts, what it ends, and what its last beat named if a killer was started.

    A killer ends it at once, or after its neighbours began.
    """
    started: list[int] = []
    ended: list[int] = []
    running: list[int] = []
    named: list[int] = []
    while waiting:
        running.append(waiting.pop())
        started.append(running[-1])
        if rnd.random() < 0.1:
            named = list(running)
        is_full = len(running) == 8 or rnd.random() < 0.2 or not waiting
        if bad & set(running) and (is_full or rnd.random() < 0.7):
            return started, ended, [id_ for id_ in named if id_ in running]
        if is_full:
            ended += running
            running = []
    return started, ended, None


@pytest.mark.parametrize("max_attempts", [2, 3, 5])
@pytest.mark.parametrize("killers", [1, 3, 30])
def test_rule_2_killers_among_innocents_start_seldom_and_charge_nobody_else(
    store: Session, leader: Leader, killers: int, max_attempts: int
) -> None:
    ids = list(enqueue(store, 150, max_attempts=max_attempts))
    rnd = random.Random(killers * 100 + max_attempts)
    bad = set(rnd.sample(ids, killers))
    starts, completed = Counter[int](), set[int]()
    for worker_id in itertools.count(1):
        worker = Worker(store, worker_id)
        # What must run alone does so first; then what was lost once, into free slots; then what comes.
        alone = worker.claim(1, tracks=(4, 3))
        chunks = alone or worker.claim(8, tracks=(2,)) or worker.claim(rnd.choice([8, 40]), tracks=(1, 0))
        if not chunks:
            break
        held = {id_: chunk.no for chunk in chunks for id_ in chunk.ids or []}
        started, ended, named = _work_off(rnd, bad, rnd.sample(list(held), len(held)))
        starts.update(started)
        completed.update(ended)
        for id_ in ended:
            worker.complete({held[id_]: [id_]})
        if named is not None:
            lose(worker, leader, named)
    charged = Counter(id_ for (id_,) in store.sql("SELECT id FROM fastq.attempt_error"))
    assert {id_ for (id_,) in store.sql("SELECT id FROM fastq.dead")} == bad
    assert completed == set(ids) - bad
    assert max(starts[id_] for id_ in bad) <= max_attempts + 1
    # Beside killers nobody is charged for what it did not start, and so fails for it.
    assert [id_ for id_ in ids if id_ not in bad and charged[id_] > starts[id_]] == []


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
        chunks = worker.claim(1, tracks=(4, 3)) or worker.claim(10, tracks=(2, 1, 0))
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
    assert leader.run("declare_dead", 9.0, [1]) == []
    assert leader.rescue() == []
    assert claims_of(store) == {(1, 1): list(ids)}


def test_rule_3_a_silent_worker_is_found_and_its_tasks_run_again(store: Session, leader: Leader) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    store.sql("UPDATE fastq.consumer SET beat_at = beat_at - interval '10 seconds'")
    assert leader.tick()["silent"] == [1]
    assert leader.run("declare_dead", 9.0, [2]) == []
    [(id_, host, pid, silent)] = leader.run("declare_dead", 9.0, [1])
    assert (id_, host, pid) == (1, "host", 1)
    assert silent >= 10
    found = leader.tick()
    assert (found["silent"], found["orphaned"], found["dead"]) == ([], True, True)
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
    store.run("unregister_consumer", idle.id, "{}", 0)
    store.run("unregister_consumer", busy.id, f"{{[{ids[0]},{ids[1]})}}", busy.no)
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


def test_a_rescue_of_some_tasks_leaves_the_others_claimed(store: Session, leader: Leader) -> None:
    """So the leader finds the one that its statement fails for."""
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    worker.claim(10)
    leader.declare_dead(worker)
    assert [row[4] for row in leader.run("rescue_claims", 50, multirange(ids[2:4]), "{}")] == [2]
    assert claims_of(store) == {(1, 1): [*ids[:2], *ids[4:]]}
    [(lost,)] = leader.run("list_lost_claims", 50, multirange(ids[:1]))
    assert ids_of(lost) == [ids[1], *ids[4:]]
    assert [row[4] for row in leader.run("rescue_claims", 50, None, multirange(ids[5:6]))] == [7]
    assert claims_of(store) == {(1, 1): [ids[5]]}
    assert leader.run("rescue_claims", 50, None, multirange(ids[5:6])) == []
    assert states(store) == dict.fromkeys(ids, "pending") | {ids[5]: "running"}


@pytest.mark.parametrize("how", ["rescued", "given back"])
def test_what_comes_back_comes_in_chunks_of_at_most_500(store: Session, leader: Leader, how: str) -> None:
    """A claim joins neighbours. In one long chunk, who claims a part would keep all others from the rest."""
    ids = enqueue(store, 1700)
    worker = Worker(store, 1)
    [no] = {chunk.no for chunk in worker.claim(1700)}
    assert claims_of(store) == {(1, no): list(ids)}
    if how == "given back":
        assert worker.give_back({no: ids}) == {}
    else:
        leader.declare_dead(worker)
        leader.rescue()
    found = chunks_of(store)
    assert [hi - lo + 1 for *_, lo, hi in found] == [500, 500, 500, 200]
    assert [id_ for *_, lo, hi in found for id_ in range(lo, hi + 1)] == list(ids)
    # In order, and each completion's row still spans less than 1,024.
    again = Worker(store, 2)
    for chunk in again.claim(2000):
        assert again.complete({chunk.no: chunk.ids or []}) == {}
    assert done_ids(store) == list(ids)
    assert store.value("SELECT max(upper(ids) - lower(ids)) FROM fastq.done") <= 1024


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


def test_rule_2_a_run_that_got_a_claim_of_its_own_after_the_beat_is_charged(store: Session, leader: Leader) -> None:
    """`complete_tx` gives it one, with a number below 0: no beat knows of later claims, and this one's run had begun."""
    [id_] = enqueue(store, max_attempts=1)
    worker = Worker(store, 1)
    worker.claim(1)
    worker.beat([id_])
    store.sql("UPDATE fastq.claim SET no = -1")
    leader.declare_dead(worker)
    leader.rescue()
    assert store.sql("SELECT id, state, attempts FROM fastq.dead") == [(id_, "failed", 1)]
