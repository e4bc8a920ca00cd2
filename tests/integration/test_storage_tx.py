"""Claims of one task, and what becomes of a transaction of the user's that is to complete it: the statements by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.support.storage import Session, Worker, claims_of, enqueue, in_background, states, wait_blocked

OpenSession = Callable[[], Session]


@pytest.fixture
def worker(store: Session) -> Worker:
    return Worker(store, 1)


def claimed(store: Session, worker: Worker, count: int) -> range:
    ids = enqueue(store, count)
    worker.claim(count)
    assert claims_of(store) == {(1, 1): list(ids)}
    return ids


def part(session: Session, members: Iterable[tuple[int, int, int]]) -> list[int]:
    """Claims of their own, for (claim, id, number). Gives the numbers that are there."""
    nos, ids, own = (list(column) for column in zip(*members, strict=True))
    return sorted(row[0] for row in session.run("part_claims", 1, nos, ids, own))


def settle(session: Session, no: int, id_: int, fresh: int = 9_999) -> str:
    """What became of one of them."""
    [(found, what)] = session.run("settle_tx", 1, [no], [id_], [fresh])
    assert found == no
    return str(what)


def complete_tx(session: Session, no: int) -> bool:
    """Whether the claim was found."""
    [(ended, home)] = session.run("complete_tx", f"{{1,{no},250}}")
    assert len(home.strip("{}").split(",")) == 2
    assert ended in ("{}", f"{{{no}}}")
    return bool(ended != "{}")


def test_tasks_get_claims_of_their_own(store: Session, worker: Worker) -> None:
    ids = claimed(store, worker, 5)
    columns = "claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at"
    before = store.sql(f"SELECT {columns} FROM fastq.claim")  # noqa: S608 our own columns
    assert part(store, [(1, ids[1], 501), (1, ids[3], 502)]) == [501, 502]
    assert claims_of(store) == {(1, 1): [ids[0], ids[2], ids[4]], (1, 501): [ids[1]], (1, 502): [ids[3]]}
    assert store.sql(f"SELECT DISTINCT {columns} FROM fastq.claim") == before  # noqa: S608 our own columns
    # An answer that was lost is asked for again, beside one that is new.
    assert part(store, [(1, ids[1], 501), (1, ids[0], 503)]) == [501, 503]
    assert claims_of(store) == {
        (1, 1): [ids[2], ids[4]],
        (1, 501): [ids[1]],
        (1, 502): [ids[3]],
        (1, 503): [ids[0]],
    }
    assert part(store, [(1, ids[2], 504), (1, ids[4], 505)]) == [504, 505]
    assert (1, 1) not in claims_of(store)
    [(started_at, base)] = {row[1:] for row in store.run("part_claims", 1, [1], [ids[2]], [504])}
    assert f"{{{started_at},{base}}}" == store.run("find_home")[0][0]


def test_only_what_a_claim_holds_gets_its_own(store: Session, worker: Worker) -> None:
    ids = claimed(store, worker, 3)
    assert worker.give_back({1: [ids[0]]}) == {}
    assert part(store, [(1, ids[0], 501), (1, ids[1], 502), (7, ids[2], 503)]) == [502]
    assert claims_of(store) == {(1, 1): [ids[2]], (1, 502): [ids[1]]}


def test_a_move_and_a_flush_of_one_claim_both_count(store: Session, worker: Worker, open_session: OpenSession) -> None:
    ids = claimed(store, worker, 3)
    other = open_session()
    store.begin()
    worker.complete({1: [ids[0]]})
    with in_background(other, lambda: part(other, [(1, ids[0], 501), (1, ids[1], 502)])) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == [502]
    assert claims_of(store) == {(1, 1): [ids[2]], (1, 502): [ids[1]]}
    assert states(store) == {ids[0]: "completed", ids[1]: "running", ids[2]: "running"}


def test_a_transaction_that_is_open_is_waited_for_by_nobody(
    store: Session, worker: Worker, open_session: OpenSession
) -> None:
    ids = claimed(store, worker, 2)
    part(store, [(1, ids[0], 501)])
    user = open_session()
    user.begin()
    assert complete_tx(user, 501)
    assert not complete_tx(user, 501)
    store.sql("SET statement_timeout = '10s'")
    assert settle(store, 501, ids[0]) == "open"
    assert worker.complete({1: [ids[1]]}) == {}
    assert worker.beat(ids) == (True, [501])
    assert states(store) == {ids[0]: "running", ids[1]: "completed"}
    user.commit()
    assert settle(store, 501, ids[0]) == "done"
    assert claims_of(store) == {}
    assert states(store) == dict.fromkeys(ids, "completed")
    [(no, took_us, attempts)] = store.sql("SELECT no, took_us, attempts FROM fastq.done WHERE lo = $1", ids[0])
    assert (no, took_us, attempts) == (501, 250, 1)
    assert store.run("find_ended_tasks", 1, [501], [ids[0]]) == [(501, ids[0])]


def test_a_transaction_that_was_rolled_back_can_not_come_late(
    store: Session, worker: Worker, open_session: OpenSession
) -> None:
    """Once its end was found out, a statement of its that was still on its way finds nothing."""
    ids = claimed(store, worker, 1)
    part(store, [(1, ids[0], 501)])
    user = open_session()
    user.begin()
    assert complete_tx(user, 501)
    user.rollback()
    assert settle(store, 501, ids[0], 601) == "back"
    assert claims_of(store) == {(1, 601): [ids[0]]}
    # The answer was lost: asked again, with the same number.
    assert settle(store, 501, ids[0], 601) == "back"
    user.begin()
    assert not complete_tx(user, 501)
    user.commit()
    assert worker.fail(601, ids) == []
    assert states(store) == {ids[0]: "failed"}


def test_a_savepoint_that_is_rolled_back_gives_the_claim_back(
    store: Session, worker: Worker, open_session: OpenSession
) -> None:
    ids = claimed(store, worker, 1)
    part(store, [(1, ids[0], 501)])
    user = open_session()
    user.begin()
    user.sql("SAVEPOINT x")
    assert complete_tx(user, 501)
    assert settle(store, 501, ids[0]) == "open"
    user.sql("ROLLBACK TO SAVEPOINT x")
    assert settle(store, 501, ids[0], 601) == "back"
    assert complete_tx(user, 601)
    user.commit()
    assert settle(store, 601, ids[0]) == "done"


@pytest.mark.parametrize("who", ["cancel", "rescue"])
def test_whoever_took_the_task_has_it(store: Session, worker: Worker, open_session: OpenSession, who: str) -> None:
    ids = claimed(store, worker, 1)
    part(store, [(1, ids[0], 501)])
    other = open_session()
    other.begin()
    if who == "cancel":
        other.run("cancel_claimed", list(ids))
    else:
        other.sql("DELETE FROM fastq.claim WHERE no = 501")
        enqueue(other, 1, first=ids[0], leaf=1)
    # They have its lock, and no more, until they commit.
    assert settle(store, 501, ids[0]) == "open"
    user = open_session()
    user.begin()
    with in_background(user, lambda: complete_tx(user, 501)) as late:
        wait_blocked(store, user)
        other.commit()
        assert not late.result(30)
    user.rollback()
    assert settle(store, 501, ids[0]) == "lost"
    assert states(store) == {ids[0]: "cancelled" if who == "cancel" else "pending"}


def test_a_completion_that_was_deleted_leaves_no_trace(
    store: Session, worker: Worker, open_session: OpenSession
) -> None:
    ids = claimed(store, worker, 1)
    part(store, [(1, ids[0], 501)])
    user = open_session()
    user.begin()
    assert complete_tx(user, 501)
    user.commit()
    store.sql("DELETE FROM fastq.done")
    store.sql("DELETE FROM fastq.task")
    assert settle(store, 501, ids[0]) == "missing"


def test_another_consumers_claim_of_that_number_is_another(store: Session, worker: Worker) -> None:
    ids = claimed(store, worker, 1)
    part(store, [(1, ids[0], 501)])
    store.sql(
        "INSERT INTO fastq.claim "
        "SELECT 2, no, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, ids FROM fastq.claim"
    )
    assert complete_tx(store, 501)
    assert claims_of(store) == {(2, 501): [ids[0]]}
