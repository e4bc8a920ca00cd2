"""What a claim no longer holds is refused, also where the rest of it is still held, and also when two results come at once."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.storage import Session, Worker, chunks_of, claims_of, enqueue, in_background, states, wait_blocked

OpenSession = Callable[[], Session]


def _claimed(store: Session, count: int) -> tuple[Worker, range]:
    ids = enqueue(store, count)
    worker = Worker(store, 1)
    worker.claim(count)
    assert claims_of(store) == {(1, 1): list(ids)}
    return worker, ids


def test_rule_1_a_failure_counts_only_for_what_its_claim_still_holds(store: Session) -> None:
    worker, ids = _claimed(store, 10)
    assert worker.give_back({1: ids[:5]}) == {}
    assert worker.fail(1, ids, None) == list(ids[:5])
    assert states(store) == dict.fromkeys(ids[:5], "pending") | dict.fromkeys(ids[5:], "failed")
    assert store.value("SELECT count(*) FROM fastq.attempt_error") == 5


def test_rule_1_only_what_a_claim_still_holds_is_given_back(store: Session) -> None:
    worker, ids = _claimed(store, 10)
    assert worker.complete({1: ids[:5]}) == {}
    assert worker.give_back({1: ids}) == {1: list(ids[:5])}
    assert states(store) == dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:], "pending")
    assert chunks_of(store) == [(1, 0, 0, ids[5], ids[9])]


def test_two_flushes_of_failures_of_one_claim_both_count(store: Session, open_session: OpenSession) -> None:
    """As with completions, the second decides on the row as the first left it."""
    worker, ids = _claimed(store, 10)
    other = open_session()
    second = Worker(other, 1, register=False)
    store.begin()
    worker.fail(1, ids[:5], None)
    with in_background(other, lambda: second.fail(1, ids, None)) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == list(ids[:5])
    assert claims_of(store) == {}
    assert states(store) == dict.fromkeys(ids, "failed")
    assert store.value("SELECT count(*) FROM fastq.attempt_error") == 10


def test_a_give_back_that_waits_for_a_flush_counts_for_the_rest(store: Session, open_session: OpenSession) -> None:
    worker, ids = _claimed(store, 10)
    other = open_session()
    second = Worker(other, 1, register=False)
    store.begin()
    worker.complete({1: ids[:5]})
    with in_background(other, lambda: second.give_back({1: ids})) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == {1: list(ids[:5])}
    assert claims_of(store) == {}
    assert states(store) == dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:], "pending")


def test_rule_1_a_snooze_counts_only_for_what_its_claim_still_holds(store: Session) -> None:
    worker, ids = _claimed(store, 10)
    assert worker.complete({1: ids[:5]}) == {}
    assert worker.snooze(1, ids) == list(ids[:5])
    assert states(store) == dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:], "pending")
    assert store.value("SELECT count(*) FROM fastq.delayed WHERE kind = 'scheduled' AND attempts = 0") == 5


def test_a_snooze_that_waits_for_a_flush_of_its_claim_decides_on_what_that_left(
    store: Session, open_session: OpenSession
) -> None:
    worker, ids = _claimed(store, 10)
    other = open_session()
    second = Worker(other, 1, register=False)
    store.begin()
    worker.complete({1: ids[:5]})
    with in_background(other, lambda: second.snooze(1, ids)) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == list(ids[:5])
    assert claims_of(store) == {}
    assert states(store) == dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:], "pending")


def test_rule_1_only_what_its_claim_still_holds_expires(store: Session) -> None:
    worker, ids = _claimed(store, 10)
    assert worker.complete({1: ids[:5]}) == {}
    assert worker.expire(1, ids[:7]) == list(ids[:5])
    ended = dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:7], "expired")
    assert states(store) == ended | dict.fromkeys(ids[7:], "running")
    assert worker.expire(1, ids[7:]) == []
    assert claims_of(store) == {}
    assert store.value("SELECT count(*) FROM fastq.dead WHERE state = 'expired' AND attempts = 0") == 5


def test_an_expiry_that_waits_for_a_flush_of_its_claim_decides_on_what_that_left(
    store: Session, open_session: OpenSession
) -> None:
    worker, ids = _claimed(store, 10)
    other = open_session()
    second = Worker(other, 1, register=False)
    store.begin()
    worker.complete({1: ids[:5]})
    with in_background(other, lambda: second.expire(1, ids)) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == list(ids[:5])
    assert claims_of(store) == {}
    assert states(store) == dict.fromkeys(ids[:5], "completed") | dict.fromkeys(ids[5:], "expired")
