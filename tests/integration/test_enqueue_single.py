"""`ProducerCore.enqueue` and `submit`: coalesced, durable, and each call on its own when something is wrong."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from fastq._engine import ProducerCore
from fastq.errors import ConnectionLost, DatabaseError, EnqueueError, PayloadError, SchemaError, SettingsError
from fastq.settings import ProducerSettings
from fastq.task import Task
from tests.support.producing import Background, answers, check_chunks, count, gather, producing, stored, value
from tests.support.waiting import PATIENCE, wait_until


@pytest.fixture
def core(dsn: str, migrated: str) -> Iterator[ProducerCore]:
    with producing(dsn, migrated) as made:
        yield made


def test_it_is_there_when_the_call_returns(core: ProducerCore, db: psycopg.Connection) -> None:
    id_, is_new = core.enqueue(Task("email:send", {"to": "ä"}, queue="mail", max_attempts=7))
    row = stored(db)[id_]
    assert (is_new, row.type, row.queue, row.max_attempts, row.payload) == (True, "email:send", "mail", 7, '{"to":"ä"}')
    check_chunks(db)


def test_delayed_tasks_wait_beside_ready_ones(core: ProducerCore, db: psycopg.Connection) -> None:
    calls = [partial(core.enqueue, Task("a", n, delay=3600 if n % 3 == 0 else None)) for n in range(60)]
    ids = [id_ for id_, _ in gather(calls)]
    kinds = {id_: row.kind for id_, row in stored(db).items()}
    assert [kinds[id_] for id_ in ids] == ["scheduled" if n % 3 == 0 else None for n in range(60)]
    check_chunks(db)


def test_concurrent_calls_share_flights(core: ProducerCore, db: psycopg.Connection) -> None:
    core.enqueue(Task("a", 0))
    before = core.stats()

    def many() -> list[int]:
        return [core.enqueue(Task("a", n))[0] for n in range(50)]

    ids = [id_ for each in gather([many] * 8) for id_ in each]
    after = core.stats()
    assert len(set(ids)) == 400
    assert count(db) == 401
    assert after["enqueued"] - before["enqueued"] == 400
    assert after["flights"] - before["flights"] < 300
    check_chunks(db)


def test_what_the_server_refuses_hurts_only_its_own_call(core: ProducerCore, db: psycopg.Connection, dsn: str) -> None:
    db.execute("ALTER TABLE task ADD CHECK (payload <> '13')")
    core.enqueue(Task("a", "warm"))
    # While a lock holds the first flight, all others gather in the next one.
    with psycopg.connect(dsn) as blocker:
        blocker.execute("SELECT set_config('search_path', %s, false)", [value(db, "SHOW search_path")])
        blocker.execute("LOCK TABLE ready IN SHARE MODE")
        calls = [Background(partial(core.enqueue, Task("a", n))) for n in range(40)]
        wait_until(
            lambda: value(db, "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'ready'::regclass") > 0
        )
    for n, call in enumerate(calls):
        if n == 13:
            with pytest.raises(DatabaseError) as refused:
                call.result()
            assert refused.value.sqlstate == "23514"
        else:
            assert call.result()[1]
    assert count(db) == 40
    check_chunks(db)


def test_a_bad_task_is_refused_before_it_is_sent(core: ProducerCore, db: psycopg.Connection) -> None:
    with pytest.raises(EnqueueError, match="type is empty"):
        core.enqueue(Task(""))
    with pytest.raises(PayloadError, match=r"payload\.a: set can't be encoded"):
        core.enqueue(Task("a", {"a": {1}}))
    assert core.stats()["flights"] == 0


def test_the_payload_limit_is_a_setting(dsn: str, migrated: str) -> None:
    with producing(dsn, migrated, payload_limit=10) as core:
        assert core.enqueue(Task("a", "x" * 8))[1]
        with pytest.raises(PayloadError, match="more than 10 bytes"):
            core.enqueue(Task("a", "x" * 9))


# --- event loops -----------------------------------------------------------------------------------


class Loop:
    """What an event loop does with a mailbox, by hand."""

    def __init__(self, core: ProducerCore) -> None:
        self.core = core
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.mailbox = core.attach_loop(self.writer.fileno())
        self.answers: dict[int, tuple[tuple[int, bool] | None, BaseException | None]] = {}
        self.wakes = 0

    def wait_for(self, numbers: list[int], timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not self.answers.keys() >= set(numbers):
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.answers)} of {len(numbers)} answers came"
            if select.select([self.reader], [], [], left)[0]:
                self.wakes += len(self.reader.recv(4096))
                for number, result, error in self.core.receive(self.mailbox):
                    self.answers[number] = result, error


@contextmanager
def loop_of(core: ProducerCore) -> Iterator[Loop]:
    loop = Loop(core)
    try:
        yield loop
    finally:
        core.detach_loop(loop.mailbox)
        loop.reader.close()
        loop.writer.close()


def test_answers_come_through_the_mailbox(core: ProducerCore, db: psycopg.Connection) -> None:
    db.execute("ALTER TABLE task ADD CHECK (payload <> '13')")
    with loop_of(core) as loop:
        numbers = [core.submit(loop.mailbox, Task("a", n)) for n in range(300)]
        loop.wait_for(numbers)
        assert len(set(numbers)) == 300
        for n, number in enumerate(numbers):
            result, error = loop.answers[number]
            if n == 13:
                assert result is None
                assert isinstance(error, DatabaseError)
            else:
                assert error is None
                assert result is not None
                assert result[1]
        assert loop.wakes < 100
    assert count(db) == 299


def test_each_loop_gets_its_own_answers(core: ProducerCore) -> None:
    with loop_of(core) as one, loop_of(core) as other:
        first = [core.submit(one.mailbox, Task("a", n)) for n in range(20)]
        second = [core.submit(other.mailbox, Task("a", n)) for n in range(20)]
        one.wait_for(first)
        other.wait_for(second)
        ids = [answer[0] for loop in (one, other) for answer in loop.answers.values()]
        assert len(set(ids)) == 40


def test_a_loop_that_has_gone_stops_nobody(core: ProducerCore, db: psycopg.Connection) -> None:
    with loop_of(core) as loop:
        core.submit(loop.mailbox, Task("a", 1))
        mailbox = loop.mailbox
    assert core.enqueue(Task("a", 2))[1]
    wait_until(lambda: count(db) == 2)
    with pytest.raises(ValueError, match="no mailbox"):
        core.submit(mailbox, Task("a", 3))


def test_what_is_no_socket_is_refused(core: ProducerCore) -> None:
    with pytest.raises((ValueError, OSError)):
        core.attach_loop(-1)
    with pytest.raises(OSError, match="descriptor"):
        core.attach_loop(1_000_000)


# --- beginnings and ends ---------------------------------------------------------------------------


def test_nothing_is_connected_before_the_first_call(dsn: str, migrated: str) -> None:
    with producing("host=127.0.0.1 port=1", migrated) as core:
        assert core.stats()["statements"] == 0


def test_a_database_that_is_not_there(migrated: str) -> None:
    with producing("host=127.0.0.1 port=1 dbname=x password=geheim", migrated, connect_timeout=0.5) as core:
        started = time.monotonic()
        for call in (
            lambda: core.enqueue(Task("a")),
            lambda: core.enqueue_many((Task("a") for _ in range(20_000)), None),
        ):
            with pytest.raises(ConnectionLost, match=r"could not connect to 127.0.0.1:1/x") as lost:
                call()
            assert not lost.value.in_doubt
            assert "geheim" not in str(lost.value)
        assert time.monotonic() - started < 10


def test_a_schema_that_is_not_migrated(dsn: str, schema: str) -> None:
    with producing(dsn, schema) as core:
        for call in (
            lambda: core.enqueue(Task("a")),
            lambda: core.enqueue_many((Task("a") for _ in range(20_000)), None),
        ):
            with pytest.raises(SchemaError, match="not migrated: run `fastq migrate`"):
                call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dsn": "nonsense"}, "connection string"),
        ({"schema": "pg_x"}, "schema"),
        ({"connect_timeout": 0.0}, "connect_timeout"),
        ({"statement_timeout": float("nan")}, "statement_timeout"),
        ({"iterable_timeout": -1.0}, "iterable_timeout"),
    ],
)
def test_wrong_settings(dsn: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ProducerCore(ProducerSettings(**{"dsn": dsn, "schema": "fastq", **changes}))


def test_close_finishes_what_is_under_way(core: ProducerCore, dsn: str, db: psycopg.Connection) -> None:
    core.enqueue(Task("a"))
    with psycopg.connect(dsn) as blocker:
        blocker.execute("SELECT set_config('search_path', %s, false)", [value(db, "SHOW search_path")])
        blocker.execute("LOCK TABLE ready IN SHARE MODE")
        calls = [Background(partial(core.enqueue, Task("a", n))) for n in range(10)]
        wait_until(
            lambda: value(db, "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'ready'::regclass") > 0
        )
        with loop_of(core) as loop:
            number = core.submit(loop.mailbox, Task("a"))
            closing = Background(core.close)
            wait_until(lambda: _is_closed(core))
            assert not closing.is_done
            blocker.commit()
            closing.result()
            loop.wait_for([number])
    assert [call.result()[1] for call in calls] == [True] * 10
    assert count(db) == 12
    core.close()


def _is_closed(core: ProducerCore) -> bool:
    try:
        core.enqueue_many([], None)
    except EnqueueError as error:
        return "the producer is closed" in str(error)
    return False


def test_a_closed_producer_refuses(core: ProducerCore) -> None:
    core.enqueue(Task("a"))
    core.close()
    for call in (lambda: core.enqueue(Task("a")), lambda: core.enqueue_many([Task("a")], None)):
        with pytest.raises(EnqueueError, match="the producer is closed"):
            call()


def test_closing_what_was_never_used(core: ProducerCore) -> None:
    core.close()
    assert core.watch(0.1) == ([], 0, True)
    with pytest.raises(EnqueueError, match="the producer is closed"):
        core.enqueue(Task("a"))


FORKED = """
import os, sys
from fastq._engine import ProducerCore
from fastq.errors import EnqueueError
from fastq.settings import ProducerSettings
from fastq.task import Task
core = ProducerCore(ProducerSettings(dsn=sys.argv[1], schema=sys.argv[2]))
unused = ProducerCore(ProducerSettings(dsn=sys.argv[1], schema=sys.argv[2]))
core.enqueue(Task("a"))
if (pid := os.fork()) == 0:
    for call in (lambda: core.enqueue(Task("a")), lambda: core.enqueue_many([], None)):
        try:
            call()
        except EnqueueError as error:
            assert "forked child" in str(error), error
        else:
            os._exit(3)
    core.close()
    assert unused.enqueue(Task("b"))[1]  # not started before the fork: the child's own
    del core, unused
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert core.enqueue(Task("a"))[1]
core.close()
"""


def test_a_forked_child_is_told(dsn: str, migrated: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, dsn, migrated], check=True, timeout=60)


def test_the_interpreter_ends_without_a_close(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    code = FORKED.partition("if (pid")[0]
    subprocess.run([sys.executable, "-c", code, dsn, migrated], check=True, timeout=60)
    assert count(db) == 1


# --- wake-ups --------------------------------------------------------------------------------------


def _listener(dsn: str, schema: str) -> psycopg.Connection:
    connection = psycopg.connect(dsn, autocommit=True)
    connection.execute(f'LISTEN "fastq:{schema}"')
    return connection


def test_consumers_are_told_the_lanes(dsn: str, migrated: str, core: ProducerCore, db: psycopg.Connection) -> None:
    with _listener(dsn, migrated) as listener:
        core.enqueue(Task("a"))
        [told] = list(listener.notifies(timeout=10, stop_after=1))
        assert told.payload == str(value(db, "SELECT id FROM lane WHERE type = 'a'"))
        core.enqueue_many((Task("b", n) for n in range(200)), None)
        [told] = list(listener.notifies(timeout=10, stop_after=1))
        assert told.payload == str(value(db, "SELECT id FROM lane WHERE type = 'b'"))
        # What waits for its time wakes nobody now.
        core.enqueue(Task("c", delay=60))
        core.enqueue_many([Task("c", delay=60) for _ in range(100)], None)
        core.enqueue(Task("d"))
        [told] = list(listener.notifies(timeout=10, stop_after=1))
        assert told.payload == str(value(db, "SELECT id FROM lane WHERE type = 'd'"))


def test_notifications_are_seldom(dsn: str, migrated: str, core: ProducerCore) -> None:
    core.enqueue(Task("a"))
    before = core.stats()["notifies"]
    started = time.monotonic()
    for n in range(300):
        core.enqueue(Task("a", n))
    elapsed = time.monotonic() - started
    assert 1 <= core.stats()["notifies"] - before <= elapsed / 0.005 + 2


def test_notifications_can_be_off(dsn: str, migrated: str) -> None:
    with producing(dsn, migrated, notify=False) as core:
        core.enqueue(Task("a"))
        core.enqueue_many((Task("a") for _ in range(200)), None)
        core.close()
        assert core.stats()["notifies"] == 0


# --- connections that break ------------------------------------------------------------------------


def test_a_terminated_backend_is_replaced(db: psycopg.Connection, dsn: str, migrated: str) -> None:
    # Named after the test's schema: others may work on the same server.
    mine = "FROM pg_stat_activity WHERE application_name = current_schema()"
    with producing(make_conninfo(dsn, application_name=migrated), migrated) as core:
        core.enqueue(Task("a", 0))
        stop = threading.Event()

        def many() -> int:
            n = 0
            while not stop.is_set():
                assert core.enqueue(Task("a", n))[1]
                n += 1
            return n

        calls = [Background(many) for _ in range(4)]
        for _ in range(5):
            seen = count(db)
            wait_until(lambda: count(db) > seen + 20)  # noqa: B023 called at once
            assert value(db, f"SELECT count(pg_terminate_backend(pid)) {mine}") >= 1
        wait_until(lambda: core.stats()["reconnects"] >= 5)
        stop.set()
        total = sum(call.result() for call in calls)
        assert count(db) == total + 1
        check_chunks(db)
        records, _, _ = core.watch(0.1)
        assert any(name == "fastq.producer" and "lost a connection" in message for _, name, message in records)


def test_ids_that_are_taken_are_replaced(core: ProducerCore, db: psycopg.Connection, dsn: str, migrated: str) -> None:
    """A crashed server may hand the same block out again."""
    first = core.enqueue(Task("a", 0))[0]
    db.execute("SELECT setval('task_id', 1, false)")
    with producing(dsn, migrated) as other:
        got = [other.enqueue(Task("b", n))[0] for n in range(5)]
    db.execute("SELECT setval('task_id', 1, false)")
    with producing(dsn, migrated) as other:
        ids = [id_ for id_, _ in answers(other.enqueue_many((Task("c", n) for n in range(2_500)), None))]
    assert first not in got
    assert count(db) == 1 + 5 + 2_500
    assert len({first, *got, *ids}) == 1 + 5 + 2_500
    check_chunks(db)
