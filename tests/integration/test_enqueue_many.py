"""`ProducerCore.enqueue_many`: streams, transactions, input that is refused."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from fastq._engine import ProducerCore
from fastq.errors import DatabaseError, EnqueueError, PayloadError, SettingsError
from fastq.task import Task
from tests.support.producing import Background, answers, check_chunks, count, gather, producing, stored, value
from tests.support.waiting import wait_until


@pytest.fixture
def core(dsn: str, migrated: str) -> Iterator[ProducerCore]:
    with producing(dsn, migrated) as made:
        yield made


def plain(n: int, *, type: str = "a") -> Iterator[Task]:  # noqa: A002 the task's word
    return (Task(type, {"n": i}) for i in range(n))


@pytest.mark.parametrize("n", [0, 1, 50, 51, 1_000, 25_000])
def test_all_are_there_in_input_order(core: ProducerCore, db: psycopg.Connection, n: int) -> None:
    got = answers(core.enqueue_many(plain(n), None))
    tasks = stored(db)
    assert [tasks[id_].payload for id_, _ in got] == [f'{{"n":{i}}}' for i in range(n)]
    assert all(is_new for _, is_new in got)
    assert len(tasks) == n
    check_chunks(db)


@pytest.mark.parametrize("n", [40, 12_000])
def test_mixed_tasks_keep_their_order_and_what_they_are(core: ProducerCore, db: psycopg.Connection, n: int) -> None:
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    tasks = [
        Task(
            f"type {i % 3}",
            b"\x00\xff" if i % 5 == 0 else {"i": i},
            queue="ä" if i % 2 else "default",
            max_attempts=1 + i % 4,
            delay=3600 if i % 7 == 0 else None,
            run_at=soon if i % 11 == 0 else None,
        )
        for i in range(n)
    ]
    got = answers(core.enqueue_many(tasks, None))
    found = stored(db)
    assert len(found) == n
    for task, (id_, is_new) in zip(tasks, got, strict=True):
        row = found[id_]
        is_delayed = task.delay is not None or task.run_at is not None
        assert is_new
        assert (row.type, row.queue, row.max_attempts) == (task.type, task.queue, task.max_attempts)
        assert row.payload == (
            "00ff" if isinstance(task.payload, bytes) else f'{{"i": {task.payload["i"]}}}'.replace(" ", "")
        )
        assert row.kind == ("scheduled" if is_delayed else None)
    check_chunks(db)
    # One run of ids a lane, max_attempts and block of 1,000: mixed tasks don't fall apart into chunks of one.
    groups = value(db, "SELECT count(*) FROM (SELECT DISTINCT lane, max_attempts FROM ready) g")
    assert value(db, "SELECT count(*) FROM ready") <= groups * 4 + n // 300


def test_run_at_wins_over_delay_and_is_kept_to_the_microsecond(core: ProducerCore, db: psycopg.Connection) -> None:
    at = dt.datetime(2031, 5, 6, 7, 8, 9, 123457, tzinfo=dt.timezone(dt.timedelta(hours=-3)))
    old = dt.datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC)
    core.enqueue_many([Task("a", delay=5, run_at=at), Task("b", run_at=old), Task("c", delay=100)], None)
    times: dict[str, dt.datetime] = dict(db.execute("SELECT type, run_at FROM tasks").fetchall())
    assert times["a"] == at
    assert times["b"] == old
    off = value(
        db, "SELECT extract(epoch FROM run_at - clock_timestamp() - interval '100 s') FROM tasks WHERE type = 'c'"
    )
    assert -30 < off <= 0


def test_bytes_of_any_kind_are_stored_as_they_are(core: ProducerCore, db: psycopg.Connection) -> None:
    raw = bytes(range(256))
    payloads: list[Any] = [raw, bytearray(raw), memoryview(raw), memoryview(raw).cast("I")]
    core.enqueue_many([Task("a", each) for each in payloads], None)
    rows = db.execute("SELECT format, payload FROM task").fetchall()
    assert rows == [("b", raw)] * 4


def test_large_payloads_are_cut_into_batches_and_chunks(core: ProducerCore, db: psycopg.Connection) -> None:
    sizes = [300_000, 1_048_576, 10, 700_000] * 10
    got = answers(core.enqueue_many((Task("a", b"x" * size) for size in sizes), None))
    found: dict[int, int] = dict(db.execute("SELECT id, octet_length(payload) FROM task").fetchall())
    assert [found[id_] for id_, _ in got] == sizes
    check_chunks(db)


# --- what is refused, before anything is written ---------------------------------------------------


def changed(**values: Any) -> Task:
    """A task that was changed after it was made."""
    task = Task("a", 1)
    for name, new in values.items():
        setattr(task, name, new)
    return task


BAD: list[tuple[Any, type[Exception], str]] = [
    (Task(""), EnqueueError, "type is empty"),
    (Task("x" * 256), EnqueueError, "type has 256 characters"),
    (Task("a\0b"), EnqueueError, "type holds a NUL character"),
    (Task("\ud800"), EnqueueError, "type holds a lone surrogate"),
    (Task("a", queue=""), EnqueueError, "queue is empty"),
    (Task("a", queue="x" * 256), EnqueueError, "queue has 256 characters"),
    (Task("a", queue="a\0"), EnqueueError, "queue holds a NUL character"),
    (Task("a", idempotency_token=""), EnqueueError, "idempotency_token is empty"),
    (Task("a", idempotency_token="x" * 256), EnqueueError, "idempotency_token has 256 characters"),
    (Task("a", idempotency_token="\0"), EnqueueError, "idempotency_token holds a NUL character"),
    (changed(type=1), EnqueueError, "type must be a str, not int"),
    (changed(idempotency_token=b"x"), EnqueueError, "idempotency_token must be a str, not bytes"),
    (changed(max_attempts=0), EnqueueError, "max_attempts is 0"),
    (changed(max_attempts=32_768), EnqueueError, "max_attempts is 32768"),
    (changed(max_attempts=1.5), EnqueueError, "max_attempts is 1.5"),
    (changed(delay=-1.0), EnqueueError, "delay is -1"),
    (changed(delay=float("nan")), EnqueueError, "delay is NaN"),
    (changed(delay=float("inf")), EnqueueError, "delay is inf"),
    (changed(delay="soon"), EnqueueError, "delay must be a number of seconds, not str"),
    (changed(delay=1e15), EnqueueError, "delay is 1000000000000000"),
    (changed(run_at=dt.datetime(2030, 1, 1)), EnqueueError, "run_at is naive"),  # noqa: DTZ001
    (changed(run_at="noon"), EnqueueError, "run_at is str"),
    (Task("a", object()), PayloadError, "payload: object can't be encoded"),
    (Task("a", "x" * 1_048_576), PayloadError, "payload has more than 1048576 bytes"),
    (Task("a", ["x"] * 1_000_000), PayloadError, "payload has more than 1048576 bytes"),
    (Task("a", b"x" * 1_048_577), PayloadError, "payload has more than 1048576 bytes"),
    ({"type": "a"}, EnqueueError, "this is no fastq.Task but dict"),
    (None, EnqueueError, "this is no fastq.Task but NoneType"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_bad_task_is_named_and_nothing_is_written(
    core: ProducerCore, db: psycopg.Connection, bad: Any, error: type[Exception], message: str
) -> None:
    for before in (3, 10_003):
        with pytest.raises(error) as refused:
            core.enqueue_many([*plain(before), bad, *plain(2)], None)
        assert message in str(refused.value)
        assert isinstance(refused.value, EnqueueError)
        assert refused.value.index == before
        assert refused.value.committed is None
    assert count(db) == 0
    assert core.enqueue(Task("a"))[1]


def test_with_commit_every_what_is_in_stays_and_is_counted(core: ProducerCore, db: psycopg.Connection) -> None:
    with pytest.raises(EnqueueError, match="2000 tasks of the call are in and stay") as refused:
        core.enqueue_many([*plain(2_500), Task("")], 1_000)
    assert (refused.value.index, refused.value.committed) == (2_500, 2_000)
    assert count(db) == 2_000
    check_chunks(db)


@pytest.mark.parametrize("every", [1, 7, 10_000, 15_000])
def test_commit_every_makes_that_many_commits(core: ProducerCore, db: psycopg.Connection, every: int) -> None:
    n = 40 if every < 10 else 40_000
    got = answers(core.enqueue_many(plain(n), every))
    assert len({id_ for id_, _ in got}) == n
    assert count(db) == n
    assert core.stats()["commits"] == -(-n // every)
    assert value(db, "SELECT count(DISTINCT xmin::text) FROM task") == -(-n // every)
    check_chunks(db)


@pytest.mark.parametrize("every", [0, -1])
def test_commit_every_is_positive(core: ProducerCore, every: int) -> None:
    with pytest.raises(SettingsError, match="commit_every"):
        core.enqueue_many([], every)


# --- iterables that fail ---------------------------------------------------------------------------


def failing(n: int, error: BaseException) -> Iterator[Task]:
    yield from plain(n)
    raise error


@pytest.mark.parametrize("n", [0, 20, 30_000])
def test_an_iterable_that_raises_writes_nothing(core: ProducerCore, db: psycopg.Connection, n: int) -> None:
    with pytest.raises(EnqueueError, match="the iterable raised KeyError: it was rolled back") as refused:
        core.enqueue_many(failing(n, KeyError("x")), None)
    assert isinstance(refused.value.__cause__, KeyError)
    assert count(db) == 0


def test_an_iterable_that_raises_with_commit_every(core: ProducerCore, db: psycopg.Connection) -> None:
    with pytest.raises(EnqueueError, match="raised ValueError: 20000 tasks of the call are in and stay") as refused:
        core.enqueue_many(failing(25_000, ValueError()), 10_000)
    assert refused.value.committed == 20_000
    assert isinstance(refused.value.__cause__, ValueError)
    assert count(db) == 20_000


def test_an_enqueue_error_of_the_iterables_own_passes(core: ProducerCore, db: psycopg.Connection) -> None:
    own = EnqueueError("I say so")
    with pytest.raises(EnqueueError) as refused:
        core.enqueue_many(failing(20_000, own), 5_000)
    assert refused.value is own
    assert own.committed == 20_000 == count(db)


@pytest.mark.parametrize("n", [5, 20_000])
def test_ctrl_c_in_the_iterable(core: ProducerCore, db: psycopg.Connection, n: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        core.enqueue_many(failing(n, KeyboardInterrupt()), None)
    assert count(db) == 0
    assert core.enqueue(Task("a"))[1]


def test_ctrl_c_while_waiting_for_the_database(core: ProducerCore, dsn: str, db: psycopg.Connection) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'ready'::regclass"

    def interrupt() -> None:
        wait_until(lambda: value(db, waiting) == 1)
        os.kill(os.getpid(), signal.SIGINT)

    def release(interrupting: Background[None], blocker: psycopg.Connection) -> None:
        interrupting.result()
        blocker.rollback()

    for call in (lambda: core.enqueue(Task("a")), lambda: core.enqueue_many(plain(25_000), None)):
        with psycopg.connect(dsn) as blocker:
            blocker.execute("SELECT set_config('search_path', %s, false)", [value(db, "SHOW search_path")])
            blocker.execute("LOCK TABLE ready IN SHARE MODE")
            interrupting = Background(interrupt)
            # A stream waits for its end, so that it is known; a second Ctrl-C would not.
            releasing = Background(partial(release, interrupting, blocker))
            with pytest.raises(KeyboardInterrupt):
                call()
            releasing.result()
    assert core.enqueue(Task("b"))[1]
    # The lock is free again before the interrupted thread has looked up: the stream may have come through, but then it is all in.
    assert count(db) in (1, 2, 25_001, 25_002)


def test_an_iterable_that_gives_nothing_is_rolled_back(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    go_on = threading.Event()

    def slow() -> Iterator[Task]:
        yield from plain(10_001)
        assert go_on.wait(60)
        yield from plain(1)

    open_transactions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = current_schema() AND state = 'idle in transaction'"
    with producing(make_conninfo(dsn, application_name=migrated), migrated, iterable_timeout=1.0) as core:
        call = Background(lambda: core.enqueue_many(slow(), None))
        wait_until(lambda: value(db, open_transactions) == 1)
        wait_until(lambda: value(db, open_transactions) == 0, message="the rollback while the iterable gives nothing")
        assert not call.is_done
        go_on.set()
        with pytest.raises(EnqueueError, match="gave nothing for 1 s while its transaction was open"):
            call.result()
        assert count(db) == 0
        assert core.enqueue(Task("a"))[1]


def test_an_iterable_may_be_slow_as_long_as_it_gives(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    pause = threading.Event()

    def slow() -> Iterator[Task]:
        yield from plain(10_000)
        for task in plain(25):
            pause.wait(0.1)
            yield task

    with producing(dsn, migrated, iterable_timeout=2.0) as core:
        assert len(core.enqueue_many(slow(), None)) == 10_025
        assert count(db) == 10_025


# --- calls beside each other -----------------------------------------------------------------------


def test_an_iterable_may_enqueue_itself(core: ProducerCore, db: psycopg.Connection) -> None:
    def nested() -> Iterator[Task]:
        yield from plain(10_001)
        core.enqueue(Task("one"))
        core.enqueue_many(plain(20, type="few"), None)
        core.enqueue_many(plain(10_500, type="many"), None)
        yield from plain(100)

    core.enqueue_many(nested(), None)
    assert dict(db.execute("SELECT type, count(*) FROM tasks GROUP BY type").fetchall()) == {
        "a": 10_101,
        "one": 1,
        "few": 20,
        "many": 10_500,
    }


def test_many_streams_at_once(core: ProducerCore, db: psycopg.Connection) -> None:
    got = gather([partial(core.enqueue_many, plain(3_000 + n), 1_000) for n in range(6)])
    ids = [id_ for each in got for id_, _ in answers(each)]
    assert len(set(ids)) == len(ids) == sum(3_000 + n for n in range(6)) == count(db)
    check_chunks(db)


def test_an_error_of_the_server_leaves_nothing_and_the_next_call_works(
    core: ProducerCore, db: psycopg.Connection
) -> None:
    db.execute("ALTER TABLE task ADD CHECK (payload <> '13')")
    for n in (20, 20_000):
        with pytest.raises(DatabaseError) as refused:
            core.enqueue_many((Task("a", i) for i in range(n)), None)
        assert refused.value.sqlstate == "23514"
        assert count(db) == 0
    assert len(core.enqueue_many((Task("a", i) for i in range(20, 20_000)), None)) == 19_980


MEMORY = """
import resource, sys
from fastq._engine import ProducerCore
from fastq.settings import ProducerSettings
from fastq.task import Task
core = ProducerCore(ProducerSettings(dsn=sys.argv[1], schema=sys.argv[2]))
core.enqueue(Task("warm", None))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
every = int(sys.argv[4]) or None
ids = core.enqueue_many((Task("a", {"n": i, "pad": "x" * 40}) for i in range(int(sys.argv[3]))), every)
assert ids.get(len(ids) - 1)[1]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
core.close()
"""


@pytest.mark.parametrize("every", [0, 10_000])
def test_memory_is_bounded(dsn: str, migrated: str, every: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, dsn, migrated, "400000", str(every)], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 80, "MiB over idle"
