"""Commits whose answer is lost: found out, never repeated blindly, and unknown stays unknown."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import psycopg
import pytest

from fastq._engine import ProducerCore
from fastq.errors import ConnectionLost
from fastq.task import Task
from tests.support.faults.network import Proxy
from tests.support.producing import Background, answers, check_chunks, count, producing, stored, value
from tests.support.waiting import until_the_next_notification, wait_until


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as made:
        yield made


@pytest.fixture
def core(proxy: Proxy, migrated: str) -> Iterator[ProducerCore]:
    with producing(proxy.dsn, migrated, connect_timeout=3.0, statement_timeout=8.0) as made:
        yield made


def tasks(n: int, *, token: bool = False, delay: float | None = None) -> list[Task]:
    return [Task("a", {"n": i}, idempotency_token=f"t{i}" if token else None, delay=delay) for i in range(n)]


# --- single enqueues -------------------------------------------------------------------------------

KINDS = {
    "plain": Task("a", "x"),
    "delayed": Task("a", "x", delay=60),
    "token": Task("a", "x", idempotency_token="new"),
    "delayed token": Task("a", "x", delay=60, idempotency_token="new"),
    "duplicate": Task("a", "x", idempotency_token="known"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flight_that_was_committed_is_not_sent_again(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection, kind: str
) -> None:
    known = core.enqueue(Task("a", "first", idempotency_token="known"))[0]
    # What it is sent with is known to the server.
    core.enqueue(Task("a", "warm"))
    core.enqueue(Task("a", "warm", delay=60))
    is_duplicate = kind == "duplicate"
    requests = core.stats()["statements"]
    # Answers are held when the flight is under way: at its last step, so that it commits.
    proxy.hold_answers()
    call = Background(lambda: core.enqueue(KINDS[kind]))
    wait_until(lambda: core.stats()["statements"] > requests)
    if kind in ("plain", "delayed"):
        wait_until(lambda: count(db) == 4)
    proxy.cut()
    id_, is_new = call.result()
    assert (id_ == known, is_new) == (is_duplicate, not is_duplicate)
    assert count(db) == (3 if is_duplicate else 4)
    assert is_duplicate or stored(db)[id_].payload == '"x"'
    check_chunks(db)


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_whose_answer_is_lost(core: ProducerCore, proxy: Proxy, db: psycopg.Connection, kind: str) -> None:
    """The last request goes through, its answer does not."""
    known = core.enqueue(Task("a", "first", idempotency_token="known"))[0]
    core.enqueue(Task("a", "warm", delay=60))
    has_token = KINDS[kind].idempotency_token is not None
    proxy.lose_answer_to(b"COMMIT" if has_token else b"\0")
    id_, is_new = core.enqueue(KINDS[kind])
    assert proxy.lost == 1
    assert (id_ == known, is_new) == (kind == "duplicate", kind != "duplicate")
    assert count(db) == (2 if kind == "duplicate" else 3)
    assert len(stored(db)) == count(db)
    check_chunks(db)


def test_what_is_found_is_not_answered_before_it_is_on_disk(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection
) -> None:
    """The commit that wakes consumers is flushed by the request after it, which is lost here with the answer to the first."""
    for n in range(5):
        # The next one is to be its process's first for some time.
        core.enqueue(Task("a", "warm"))
        until_the_next_notification()
        lost = proxy.lost
        before = value(db, "SELECT pg_current_wal_insert_lsn()")
        proxy.lose_answer_to(b"\0")
        id_, is_new = core.enqueue(Task("a", n))
        after = value(db, "SELECT pg_current_wal_flush_lsn()")
        assert (is_new, proxy.lost) == (True, lost + 1)
        assert id_ in stored(db)
        assert db.execute("SELECT pg_wal_lsn_diff(%s, %s) > 0", (after, before)).fetchone() == (True,)
    check_chunks(db)


def test_a_request_that_never_arrived_is_sent_again(core: ProducerCore, proxy: Proxy, db: psycopg.Connection) -> None:
    core.enqueue(Task("a", 0))
    proxy.hold_requests()
    calls = [Background(partial(core.enqueue, Task("a", n))) for n in range(5)]
    wait_until(lambda: core.stats()["flights"] >= 2)
    proxy.cut()
    assert len({call.result()[0] for call in calls}) == 5
    assert count(db) == 6
    check_chunks(db)


@pytest.mark.parametrize("kind", ["plain", "delayed", "token"])
def test_a_first_try_that_is_still_under_way(
    core: ProducerCore, proxy: Proxy, dsn: str, db: psycopg.Connection, kind: str
) -> None:
    """Its backend waits for a lock and doesn't know that its client has gone; it must not come in beside the second try."""
    core.enqueue(Task("a", 0))
    core.enqueue(Task("a", 0, delay=60))
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IN ('ready'::regclass, 'delayed'::regclass)"
    with psycopg.connect(dsn) as blocker:
        blocker.execute("SELECT set_config('search_path', %s, false)", [value(db, "SHOW search_path")])
        blocker.execute("LOCK TABLE ready, delayed IN SHARE MODE")
        call = Background(lambda: core.enqueue(KINDS[kind]))
        wait_until(lambda: value(db, waiting) == 1)
        proxy.cut()
        wait_until(lambda: value(db, waiting) == 2 or kind == "token")
        blocker.commit()
    id_, is_new = call.result()
    assert is_new
    assert stored(db)[id_].payload == '"x"'
    wait_until(lambda: value(db, waiting) == 0)
    assert count(db) == 3
    check_chunks(db)


def test_unknown_stays_unknown(proxy: Proxy, migrated: str, db: psycopg.Connection) -> None:
    with producing(proxy.dsn, migrated, connect_timeout=1.0, statement_timeout=1.5) as core:
        core.enqueue(Task("a", 0))
        proxy.hold_answers()
        call = Background(lambda: core.enqueue(Task("a", 1)))
        wait_until(lambda: count(db) == 2)
        proxy.refuse()
        with pytest.raises(ConnectionLost) as lost:
            call.result()
        assert lost.value.in_doubt
        # The next call was not sent: nothing is in doubt.
        with pytest.raises(ConnectionLost) as lost:
            core.enqueue(Task("a", 2))
        assert not lost.value.in_doubt
    assert count(db) == 2


def test_a_link_that_goes_silent_counts_as_lost(proxy: Proxy, migrated: str, db: psycopg.Connection) -> None:
    with producing(proxy.dsn, migrated, statement_timeout=1.0) as core:
        core.enqueue(Task("a", 0))
        proxy.hold_answers()
        call = Background(lambda: core.enqueue(Task("a", 1)))
        wait_until(lambda: core.stats()["reconnects"] >= 1)
        proxy.cut()
        assert call.result()[1]
        assert count(db) == 2


# --- streams ---------------------------------------------------------------------------------------

STREAMS = {"plain": tasks(12_000), "tokens": tasks(12_000, token=True), "delayed": tasks(300, delay=60)}


@pytest.mark.parametrize("every", [None, 5_000])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_streams_commit_whose_answer_is_lost(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection, kind: str, every: int | None
) -> None:
    core.enqueue(Task("warm"))
    proxy.lose_answer_to(b"COMMIT")
    got = answers(core.enqueue_many(STREAMS[kind], every))
    assert proxy.lost == 1
    assert all(is_new for _, is_new in got)
    found = stored(db)
    assert [found[id_].payload for id_, _ in got] == [f'{{"n":{i}}}' for i in range(len(got))]
    assert count(db) == len(got) + 1
    check_chunks(db)


def test_a_commit_that_wrote_nothing_is_never_in_doubt(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection
) -> None:
    first = answers(core.enqueue_many(tasks(200, token=True), None))
    proxy.lose_answer_to(b"COMMIT")
    assert answers(core.enqueue_many(tasks(200, token=True), None)) == [(id_, False) for id_, _ in first]
    assert count(db) == 200


@pytest.mark.parametrize("kind", STREAMS)
def test_a_streams_commit_that_never_arrived_is_sent_again(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection, kind: str
) -> None:
    core.enqueue(Task("warm"))
    proxy.lose_request(b"COMMIT")
    got = answers(core.enqueue_many(STREAMS[kind], None))
    assert proxy.lost == 1
    found = stored(db)
    assert [found[id_].payload for id_, _ in got] == [f'{{"n":{i}}}' for i in range(len(got))]
    assert count(db) == len(got) + 1
    check_chunks(db)


def test_a_large_transaction_that_is_cut_off_is_not_in(
    core: ProducerCore, proxy: Proxy, db: psycopg.Connection
) -> None:
    """Too large to be kept and sent again: a clear answer instead."""
    proxy.lose_request(b"COMMIT")
    with pytest.raises(ConnectionLost, match="nothing of the call is written") as lost:
        core.enqueue_many((Task("a", b"x" * 50_000) for _ in range(600)), None)
    assert proxy.lost == 1
    assert not lost.value.in_doubt
    assert lost.value.is_transient
    assert count(db) == 0


def test_a_large_transaction_whose_commit_got_through(core: ProducerCore, proxy: Proxy, db: psycopg.Connection) -> None:
    proxy.lose_answer_to(b"COMMIT")
    got = answers(core.enqueue_many((Task("a", b"x" * 50_000) for _ in range(600)), None))
    assert proxy.lost == 1
    assert len({id_ for id_, _ in got}) == 600 == count(db)
    check_chunks(db)


def test_a_streams_commit_stays_unknown(proxy: Proxy, migrated: str, db: psycopg.Connection) -> None:
    with producing(proxy.dsn, migrated, connect_timeout=1.0, statement_timeout=1.5) as core:
        core.enqueue(Task("warm"))
        proxy.lose_answer_to(b"COMMIT", then_refuse=True)
        with pytest.raises(ConnectionLost) as lost:
            core.enqueue_many(tasks(12_000), None)
        assert lost.value.in_doubt
    assert count(db) == 12_001


def test_with_commit_every_what_is_in_is_counted(proxy: Proxy, migrated: str, db: psycopg.Connection) -> None:
    with producing(proxy.dsn, migrated, connect_timeout=1.0, statement_timeout=1.5) as core:
        core.enqueue(Task("warm"))

        def then_cut() -> Iterator[Task]:
            yield from tasks(5_000)
            wait_until(lambda: count(db) == 5_001)
            proxy.refuse()
            yield from tasks(5_000)

        with pytest.raises(ConnectionLost, match="5000 tasks of the call are in and stay") as lost:
            core.enqueue_many(then_cut(), 5_000)
        assert not lost.value.in_doubt
    assert count(db) == 5_001
