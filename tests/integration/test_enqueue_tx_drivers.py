"""Tasks in the user's own transaction: what must hold on every driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from fastq import EnqueueError, Producer, Task
from tests.support.producing import check_chunks, count, stored, value
from tests.support.users import USERS, AsyncpgUser, PsycopgUser, User
from tests.support.waiting import wait_until

NewUser = Callable[[], User]


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


#: What depends on the server alone, or on what all drivers share, is looked at with a sync and an async one.
two_users = pytest.mark.parametrize("new_user", [PsycopgUser, AsyncpgUser], indirect=True, ids=lambda kind: kind.name)


@pytest.fixture(params=USERS, ids=lambda kind: kind.name)
def new_user(request: pytest.FixtureRequest, producer: Producer, dsn: str) -> Iterator[NewUser]:
    """Makes users of one driver."""
    with ExitStack() as stack:

        def made() -> User:
            user: User = request.param(producer, dsn)
            stack.callback(user.close)
            return user

        yield made


@pytest.fixture
def user(new_user: NewUser) -> User:
    return new_user()


def test_a_task_comes_with_the_commit(user: User, db: psycopg.Connection) -> None:
    answer = user.enqueue(Task("a", {"n": "ü"}, queue="q", max_attempts=7))
    assert answer.is_new
    assert count(db) == 0
    user.commit()
    task = stored(db)[answer.id]
    assert (task.type, task.queue, task.kind, task.max_attempts, task.payload) == ("a", "q", None, 7, '{"n":"ü"}')
    check_chunks(db)


def test_what_is_rolled_back_was_never_there(user: User, db: psycopg.Connection) -> None:
    user.enqueue(Task("a", idempotency_token="t"))
    user.enqueue_many([Task("a") for _ in range(100)])
    user.enqueue(Task("a", delay=60))
    user.rollback()
    assert count(db) == 0
    assert (
        value(db, "SELECT (SELECT count(*) FROM ready) + (SELECT count(*) FROM token) + (SELECT count(*) FROM delayed)")
        == 0
    )
    # The token is free again, and the connection as it was.
    assert user.enqueue(Task("a", idempotency_token="t")).is_new
    user.commit()
    assert count(db) == 1


def test_a_savepoint_that_is_rolled_back_takes_only_its_own_tasks(user: User, db: psycopg.Connection) -> None:
    kept = user.enqueue(Task("a"))
    user.execute("SAVEPOINT mine")
    user.enqueue(Task("a", idempotency_token="t"))
    user.enqueue_many([Task("a") for _ in range(100)])
    user.execute("ROLLBACK TO SAVEPOINT mine")
    also = user.enqueue(Task("a", idempotency_token="t"))
    user.commit()
    assert also.is_new
    assert set(stored(db)) == {kept.id, also.id}
    check_chunks(db)


@two_users
def test_what_the_user_writes_and_the_tasks_are_one_transaction(user: User, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE account (id int)")
    insert = value(db, "SELECT format('INSERT INTO %I.account VALUES (1)', current_schema())")
    user.execute(insert)
    user.enqueue(Task("a"))
    user.rollback()
    assert (value(db, "SELECT count(*) FROM account"), count(db)) == (0, 0)
    user.execute(insert)
    user.enqueue(Task("a"))
    user.commit()
    assert (value(db, "SELECT count(*) FROM account"), count(db)) == (1, 1)


@pytest.mark.parametrize("size", [50, 1_300])
def test_many_tasks_answer_in_input_order(user: User, db: psycopg.Connection, size: int) -> None:
    tasks = [Task("ab"[n % 2], {"n": n}, max_attempts=3 + n % 3 // 2) for n in range(size)]
    answers = user.enqueue_many(tasks)
    assert count(db) == 0
    user.commit()
    found = stored(db)
    assert len(answers) == len(found) == size
    for n, answer in enumerate(answers):
        assert answer.is_new
        assert (found[answer.id].type, found[answer.id].payload) == ("ab"[n % 2], f'{{"n":{n}}}')
    check_chunks(db)
    if size > 1_000:
        # In runs, not one by one: 3 kinds of tasks among them.
        assert value(db, "SELECT count(*) FROM ready") <= 8


@two_users
def test_bytes_of_any_value_and_large_ones_go_in(user: User, db: psycopg.Connection) -> None:
    every = bytes(range(256))
    answers = [user.enqueue(Task("a", every)), *user.enqueue_many([Task("a", every * 4_000), Task("a", b"")])]
    user.commit()
    assert [bytes.fromhex(stored(db)[answer.id].payload) for answer in answers] == [every, every * 4_000, b""]


def test_tasks_for_later(user: User, db: psycopg.Connection) -> None:
    """Their delay counts from the call, not from the transaction's beginning."""
    size = 100
    user.execute("SELECT 1")
    started = value(db, "SELECT clock_timestamp()")
    wait_until(lambda: value(db, "SELECT clock_timestamp()") > started + timedelta(seconds=0.3))
    run_at = datetime(2199, 7, 1, 12, 30, 15, 123_457, tzinfo=UTC)
    gone = datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    before = value(db, "SELECT clock_timestamp()")
    tasks = [Task("a", {"n": n}, delay=3_600) for n in range(size - 3)]
    answers = user.enqueue_many([*tasks, Task("a", run_at=run_at), Task("a", run_at=gone), Task("a", delay=1e-6)])
    after = value(db, "SELECT clock_timestamp()")
    user.commit()
    times: dict[int, datetime] = dict(db.execute("SELECT id, run_at FROM delayed").fetchall())
    assert len(times) == size
    *delayed, at, past, soon = answers
    hour = timedelta(hours=1)
    assert all(before + hour <= times[answer.id] <= after + hour for answer in delayed)
    assert (times[at.id], times[past.id]) == (run_at, gone)
    assert before <= times[soon.id] <= after + timedelta(seconds=1)
    assert value(db, "SELECT min(created_at) FROM delayed") >= before
    assert value(db, "SELECT count(*) FROM tasks WHERE kind = 'scheduled'") == size


@pytest.mark.parametrize("size", [10, 1_300])
def test_tokens_answer_in_input_order(user: User, producer: Producer, db: psycopg.Connection, size: int) -> None:
    held = {n: producer.enqueue(Task("a", idempotency_token=f"ü{n}")).id for n in range(0, size, 7)}
    # Twice each, the second ones in the other order, and some without.
    order = [*range(size), *reversed(range(size))]
    answers = user.enqueue_many(
        [*(Task("a", {"n": n}, idempotency_token=f"ü{n}", delay=60 if n % 5 == 1 else None) for n in order), Task("a")]
    )
    user.commit()
    first = {n: answers[n].id for n in range(size)}
    for n, answer in zip(order, answers, strict=False):
        assert answer.id == held.get(n, first[n])
    assert [answer.is_new for answer in answers[:size]] == [n not in held for n in range(size)]
    assert not any(answer.is_new for answer in answers[size : 2 * size])
    assert answers[2 * size].is_new
    assert count(db) == size + 1
    assert value(db, "SELECT count(*) FROM token") == size
    check_chunks(db)


@two_users
def test_a_single_duplicate_answers_the_existing_id(user: User, db: psycopg.Connection) -> None:
    first = user.enqueue(Task("a", idempotency_token="t"))
    assert user.enqueue(Task("a", idempotency_token="t")) == (first.id, False)
    assert user.enqueue(Task("b", idempotency_token="t")).is_new
    user.commit()
    assert user.enqueue(Task("a", idempotency_token="t")) == (first.id, False)
    user.commit()
    assert count(db) == 2


@pytest.mark.parametrize(("end", "size"), [("commit", 1), ("rollback", 300)])
def test_of_two_with_one_token_the_second_waits_for_the_firsts_end(
    new_user: NewUser, db: psycopg.Connection, end: str, size: int
) -> None:
    first, second = new_user(), new_user()
    tasks = [Task("a", idempotency_token=f"t{n}") for n in range(size)]
    [*mine] = first.enqueue_many(tasks)
    waiting = second.start(lambda: list(second.call_enqueue_many(tasks)))
    wait_until(lambda: value(db, f"SELECT cardinality(pg_blocking_pids({second.pid}))") > 0)
    assert not waiting.done()
    getattr(first, end)()
    theirs = waiting.result(30)
    second.commit()
    if end == "commit":
        assert theirs == [(answer.id, False) for answer in mine]
    else:
        assert all(answer.is_new for answer in theirs)
    assert count(db) == size
    assert value(db, "SELECT count(*) FROM token JOIN task USING (id)") == size
    check_chunks(db)


@two_users
def test_new_lanes_make_no_two_transactions_wait(new_user: NewUser, db: psycopg.Connection) -> None:
    first, second = new_user(), new_user()
    for user, types in ((first, ["a", "b"]), (second, ["b", "a"])):
        for type_ in types:
            user.enqueue(Task(type_, queue="new"))
    second.commit()
    first.rollback()
    assert count(db) == 2
    # Committed whatever became of the transaction that needed it first.
    assert value(db, "SELECT count(*) FROM lane") == 2


def test_a_failed_transaction_gives_the_drivers_own_error(user: User) -> None:
    user.enqueue(Task("a"))
    with pytest.raises(Exception, match="division by zero"):
        user.execute("SELECT 1 / 0")
    with pytest.raises(Exception, match="current transaction is aborted") as caught:
        user.enqueue(Task("a"))
    assert not isinstance(caught.value, EnqueueError)
    user.rollback()
    assert user.enqueue(Task("a")).is_new


@two_users
def test_a_token_that_is_waited_for_too_long_is_the_users(new_user: NewUser, db: psycopg.Connection) -> None:
    first, second = new_user(), new_user()
    first.enqueue(Task("a", idempotency_token="t"))
    second.execute("SET LOCAL lock_timeout = '50ms'")
    with pytest.raises(Exception, match="lock timeout") as caught:
        second.enqueue(Task("a", idempotency_token="t"))
    assert "somebody's open transaction holds an idempotency token" in caught.value.__notes__[0]
    first.commit()
    second.rollback()
    assert not second.enqueue(Task("a", idempotency_token="t")).is_new
    assert count(db) == 1


@two_users
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_serialization_failure_is_the_users(
    user: User, producer: Producer, db: psycopg.Connection, level: str
) -> None:
    user.rollback()
    user.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
    user.execute("SELECT count(*) FROM pg_class")
    existing = producer.enqueue(Task("a", idempotency_token="t"))
    assert user.enqueue(Task("b")).is_new
    with pytest.raises(Exception, match="could not serialize") as caught:
        user.enqueue(Task("a", idempotency_token="t"))
    assert "roll it back and run it again" in caught.value.__notes__[0]
    user.rollback()
    assert user.enqueue(Task("a", idempotency_token="t")) == (existing.id, False)


@two_users
def test_a_deadlock_is_the_users(new_user: NewUser, db: psycopg.Connection) -> None:
    first, second = new_user(), new_user()
    first.enqueue(Task("a", idempotency_token="x"))
    second.enqueue(Task("a", idempotency_token="y"))
    waiting = [
        first.start(lambda: first.call_enqueue(Task("a", idempotency_token="y"))),
        second.start(lambda: second.call_enqueue(Task("a", idempotency_token="x"))),
    ]
    wait_until(lambda: all(each.done() for each in waiting))
    [index] = [n for n, each in enumerate(waiting) if each.exception() is not None]
    error = waiting[index].exception()
    assert error is not None
    assert "deadlock" in str(error)
    assert "two transactions waited for each other" in error.__notes__[0]
    (first, second)[index].rollback()
    assert waiting[1 - index].result(30).is_new
    (second, first)[index].commit()
    assert count(db) == 2


@two_users
def test_a_bad_task_among_many_is_refused_before_anything_is_sent(user: User, db: psycopg.Connection) -> None:
    with pytest.raises(EnqueueError, match="task 1200: payload") as caught:
        user.enqueue_many(Task("a", {"x": object()} if n == 1_200 else None) for n in range(1_300))
    assert caught.value.index == 1_200
    # The transaction goes on.
    assert user.enqueue(Task("a")).is_new
    user.commit()
    assert count(db) == 1


@two_users
def test_an_iterable_that_raises_leaves_the_transaction_as_it_was(user: User, db: psycopg.Connection) -> None:
    def tasks() -> Iterator[Task]:
        yield from (Task("a") for _ in range(100))
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        user.enqueue_many(tasks())
    user.commit()
    assert count(db) == 0


@two_users
def test_a_search_path_with_other_tables_and_settings_does_not_matter(user: User, db: psycopg.Connection) -> None:
    schema = value(db, "SELECT current_schema()")
    db.execute(f'CREATE SCHEMA "evil_{schema}"'.encode())
    try:
        for table in ("task", "ready", "token", "lane", "delayed", "leaf"):
            db.execute(f'CREATE TABLE "evil_{schema}".{table} (nothing int)'.encode())
        for setting in (
            f'search_path = "evil_{schema}"',
            "bytea_output = 'escape'",
            "datestyle = 'German'",
            "timezone = 'Europe/Berlin'",
            "intervalstyle = 'sql_standard'",
            "extra_float_digits = -10",
            "array_nulls = on",
            "standard_conforming_strings = on",
            "plan_cache_mode = force_generic_plan",
        ):
            user.execute(f"SET LOCAL {setting}")
        answers = user.enqueue_many(
            [
                Task("a", {"n": "ü"}, idempotency_token="ü"),
                Task("a", delay=0.123456789),
                Task("a", run_at=datetime(2030, 3, 31, 1, 30, tzinfo=UTC)),
            ]
        )
        large = user.enqueue_many([Task("a", idempotency_token=f"ü{n}") for n in range(200)])
        user.commit()
        assert all(answer.is_new for answer in [*answers, *large])
        assert value(db, "SELECT run_at FROM delayed ORDER BY run_at DESC LIMIT 1") == datetime(
            2030, 3, 31, 1, 30, tzinfo=UTC
        )
        assert value(db, "SELECT count(*) FROM token WHERE token LIKE 'ü%'") == 201
    finally:
        db.execute(f'DROP SCHEMA "evil_{schema}" CASCADE'.encode())


def test_sync_and_async_connections_are_not_mixed_up(producer: Producer, user: User) -> None:
    target = user.target()
    if user.is_async:
        with pytest.raises(TypeError, match=r"needs a sync connection.*not .*Connection|not .*Session"):
            producer.enqueue_tx(target, Task("a"))
    else:
        with pytest.raises(TypeError, match="needs an async connection"):
            user.do(lambda: user.wait(producer.aenqueue_tx(target, Task("a"))))
