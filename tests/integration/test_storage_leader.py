"""The leader: who gets the lease, who may do upkeep, and two of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.storage import (
    TEXTS,
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


def attempts_of(store: Session) -> dict[int, int]:
    """What waits: id → runs charged."""
    return {id_: attempts for _, _, attempts, lo, hi in chunks_of(store) for id_ in range(lo, hi + 1)}


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
    assert leader.run("declare_dead", 9.0, [1, 5]) == []
    assert leader.rescue() == []
    assert leader.run("rescue_claims", 50, "{[1,100000)}", "{}") == []
    assert leader.run("list_lost_claims", 50, "{}") == []
    leader.run("promote_tasks", 10, 0)
    assert leader.run("postpone_task") == []
    leader.run("forget_consumers")
    assert leader.run("open_leaf", 0.0) == []
    store.sql("UPDATE fastq.leaf SET state = 'closed', closed_at = opened_at WHERE state = 'open'")
    store.sql("UPDATE fastq.leaf SET state = 'open', opened_at = clock_timestamp() WHERE no = 1")
    assert leader.one("move_chunks", 0, 10) == (0, 0)
    assert leader.one("carry_delayed", 0, 10) == (0, 0)
    assert leader.one("check_leaf_empty", 3, 0.0) == (False,)
    assert leader.one("purge_dead", ["failed"], [None], [0.0], 10) == (0,)
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
    assert (found["silent"], found["orphaned"], found["dead"], found["careful_lanes"]) == ([], False, False, [])
    delay(store, [1], 60.0)
    assert 50 < leader.tick()["due_in"] <= 60
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    worker.claim(1)
    worker.beat([id_])
    leader.declare_dead(worker)
    leader.rescue()
    assert leader.tick()["careful_lanes"] == [1]
    for track in (3, 4):
        store.sql("UPDATE fastq.ready SET track = $1", track)
        found = leader.tick()
        assert (found["careful_lanes"], found["alone_lanes"]) == ([], [1])


#: What the leader sends that asks for no term: it reads, or comes after a statement of the same transaction that has asked, or takes
#: the lease itself, or only wakes consumers.
ASKS_NOTHING = {
    "list_leaves_to_empty",
    "list_used_leaves",
    "flush_log",
    "lock_leaf",
    "check_leaf_archived",
    "truncate_leaf",
    "free_leaf",
    "tick",
    "notify_ready",
}


def test_every_statement_of_upkeep_asks_for_holder_and_term() -> None:
    """A leader of yesterday changes nothing, whatever it still has under way."""
    folder = Path(__file__).parents[2] / "rust/src/engine/consume"
    sources = [folder / "upkeep.rs", folder / "retain.rs", *(folder / "upkeep").glob("*.rs")]
    names = {name for path in sources for name in re.findall(r'"([a-z_]+)"', path.read_text()) if name in TEXTS}
    assert len(names) > 15
    assert names >= ASKS_NOTHING
    asking = {name for name in names if "fastq.leader WHERE holder = $1::bigint AND term = $2::bigint" in TEXTS[name]}
    asking |= {
        name for name in names if TEXTS[name].split() and "UPDATE fastq.leader" in TEXTS[name] and name != "tick"
    }
    assert names - asking == ASKS_NOTHING
