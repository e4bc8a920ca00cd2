"""A task that is completed in its handler's own transaction: whatever becomes of the transaction and of the handler."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from fastq import (
    Client,
    CompletionError,
    Producer,
    Retention,
    Snooze,
    Task,
    TaskInfo,
    TaskLost,
    _engine,
)
from fastq._engine import TxCompletion
from fastq.migrations import migrate
from tests.support.completing import Play, counted, effects, playing, wait_counted, wait_until_idle
from tests.support.consuming import errors, states
from tests.support.faults.server import PrivateServer
from tests.support.lab import Lab
from tests.support.producing import Background, value
from tests.support.users import AsyncpgUser, PsycopgUser, User, user_of
from tests.support.waiting import wait_until

_ROLLED_BACK = "the transaction that was to complete it (complete_tx) was rolled back"


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    db.execute("CREATE TABLE effect (id bigint)")
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.fixture
def play(lab: Lab) -> Iterator[Play]:
    with playing(lab) as play:
        yield play


@pytest.fixture
def user(lab: Lab, dsn: str) -> Iterator[User]:
    with user_of(PsycopgUser, lab.producer, dsn) as made:
        yield made


@pytest.fixture
def insert(db: psycopg.Connection) -> str:
    """A handler's statement, on whatever connection."""
    return str(value(db, "SELECT format('INSERT INTO %I.effect VALUES (1)', current_schema())"))


# --- the neighbours --------------------------------------------------------------------------------


def test_an_open_transaction_holds_up_no_neighbour_of_its_claim(lab: Lab, play: Play, user: User, insert: str) -> None:
    ids = lab.enqueue(*range(4))
    puppet = play(concurrency=4)
    runs = {run.task.id: run for run in (puppet.next() for _ in ids)}
    assert lab.all("SELECT count(*) FROM claim") == [(1,)], "they have one claim"
    user.execute(insert)
    user.complete(runs[ids[1]].task)
    for id_ in (ids[0], ids[2], ids[3]):
        runs[id_].end()
    lab.wait_for(completed=3, running=1)
    wait_counted(puppet.consumer, completed=3)
    # And the handler of the one that is open ends, too: more come and go all the same.
    runs[ids[1]].end()
    for _ in range(20):
        lab.enqueue("more")
        puppet.next().end()
    lab.wait_for(completed=23, running=1)
    beats = puppet.consumer.stats()["beats"]
    wait_until(lambda: puppet.consumer.stats()["beats"] > beats + 2)
    user.commit()
    lab.wait_for(completed=24)
    wait_counted(puppet.consumer, completed=24)
    assert effects(lab) == 1
    assert sorted(lab.completions()) == lab.value("SELECT array_agg(id ORDER BY id) FROM task")


def test_a_claim_of_one_task_moves_as_any_other(lab: Lab, play: Play, user: User) -> None:
    lab.enqueue("alone")
    puppet = play()
    run = puppet.next()
    before = lab.all(
        "SELECT consumer, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, ids FROM claim"
    )
    user.complete(run.task)
    # Below those of claims, so that a rescue knows that its run had begun.
    assert lab.all("SELECT no < 0 FROM claim") == [(True,)]
    after = lab.all(
        "SELECT consumer, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, ids FROM claim"
    )
    assert after == before
    user.commit()
    run.end()
    wait_counted(puppet.consumer, completed=1)


# --- the handler ends, then the transaction ----------------------------------------------------------


def test_a_handler_that_returns_first_waits_for_its_transactions_commit(lab: Lab, play: Play, user: User) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    run.end()
    # It is neither counted nor run again while nobody knows.
    wait_until_idle(puppet.consumer)
    assert counted(puppet.consumer)
    assert states(lab.db) == {"running": 1}
    user.commit()
    lab.wait_for(completed=1)
    wait_counted(puppet.consumer, completed=1)


@pytest.mark.parametrize("how", ["rolled back", "killed", "closed"])
def test_a_handler_that_returns_though_its_transaction_is_gone_has_failed(
    lab: Lab, play: Play, dsn: str, insert: str, how: str
) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    conn = psycopg.connect(dsn)
    conn.execute(insert.encode())
    run.do(lambda: run.task.complete_tx(conn))
    if how == "rolled back":
        conn.rollback()
    elif how == "killed":
        assert lab.value("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)
    run.end()
    if how == "closed":
        conn.close()
    again = puppet.next()
    assert again.task.attempt == 2
    assert effects(lab) == 0
    [(attempt, error, _)] = errors(lab.db)
    assert attempt == 1
    assert error.startswith(f"CompletionError: {_ROLLED_BACK}")
    run_user = psycopg.connect(dsn)
    run_user.execute(insert.encode())
    again.do(lambda: again.task.complete_tx(run_user))
    run_user.commit()
    again.end()
    wait_counted(puppet.consumer, completed=1, retried=1)
    assert effects(lab) == 1
    conn.close()
    run_user.close()


def test_a_handler_whose_transaction_is_gone_fails_for_good_in_its_last_attempt(
    lab: Lab, play: Play, user: User
) -> None:
    lab.enqueue("t", max_attempts=1)
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    user.rollback()
    run.end()
    lab.wait_for(failed=1)
    wait_counted(puppet.consumer, failed=1)


def test_a_handler_that_raises_after_the_commit_has_completed(
    lab: Lab, play: Play, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    [id_] = lab.enqueue("t")
    told: list[BaseException] = []
    puppet = play(error_hook=lambda _, error, *, is_final: told.append(error))
    run = puppet.next()
    user.complete(run.task)
    user.commit()
    with caplog.at_level(logging.WARNING, "fastq"):
        run.end(ValueError("too late"))
        wait_counted(puppet.consumer, completed=1)
    lab.wait_for(completed=1)
    assert (errors(lab.db), told) == ([], [])
    [record] = [record for record in caplog.records if f"task {id_}" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert "was completed by its transaction" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "too late"


@pytest.mark.parametrize("error", [ValueError("too soon"), Snooze(60)], ids=["error", "snooze"])
def test_a_handler_that_raises_before_the_commit_has_completed(
    lab: Lab, play: Play, user: User, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    run.end(error)
    wait_until_idle(puppet.consumer)
    assert states(lab.db) == {"running": 1}
    with caplog.at_level(logging.ERROR, "fastq"):
        user.commit()
        wait_counted(puppet.consumer, completed=1)
        wait_until(lambda: f"task {id_} is completed by its transaction" in caplog.text)
    lab.wait_for(completed=1)
    assert errors(lab.db) == []


@pytest.mark.parametrize("order", ["first raises", "first rolls back"])
def test_a_handler_that_raises_and_rolls_back_has_failed_for_its_own_reason(
    lab: Lab, play: Play, user: User, order: str
) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    if order == "first raises":
        run.end(ValueError("no"))
        wait_until_idle(puppet.consumer)
        user.rollback()
    else:
        user.rollback()
        run.end(ValueError("no"))
    assert puppet.next().task.attempt == 2
    assert [error for _, error, _ in errors(lab.db)] == ["ValueError: no"]
    wait_counted(puppet.consumer, retried=1)


def test_an_attempt_that_ran_out_of_time_after_the_commit_has_completed(
    lab: Lab, play: Play, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    [id_] = lab.enqueue("t")
    puppet = play(options={"timeout": 0.7})
    run = puppet.next()
    user.complete(run.task)
    with caplog.at_level(logging.ERROR, "fastq"):
        wait_until(lambda: puppet.consumer.stats()["timed_out"] == 1)
        user.commit()
        wait_counted(puppet.consumer, completed=1)
        wait_until(lambda: f"task {id_} is completed by its transaction" in caplog.text)
    lab.wait_for(completed=1)
    with pytest.raises(TaskLost):
        user.complete(run.task)


def test_an_attempt_that_ran_out_of_time_and_rolls_back_is_retried(lab: Lab, play: Play, user: User) -> None:
    lab.enqueue("t")
    puppet = play(options={"timeout": 0.7})
    run = puppet.next()
    user.complete(run.task)
    wait_until(lambda: puppet.consumer.stats()["timed_out"] == 1)
    user.rollback()
    with pytest.raises(TaskLost):
        user.complete(run.task)
    user.rollback()
    assert puppet.next().task.attempt == 2


# --- calls that make no sense ------------------------------------------------------------------------


def test_a_task_is_completed_once(lab: Lab, play: Play, user: User, dsn: str) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    with pytest.raises(CompletionError, match="is being completed already, by a transaction of this run"):
        user.complete(run.task)
    # Another connection would wait for the first one's end, for ever where both are one handler's.
    with psycopg.connect(dsn) as other, pytest.raises(CompletionError, match="is being completed already"):
        run.do(lambda: run.task.complete_tx(other))
    user.commit()
    with pytest.raises(CompletionError, match="was completed before, by an earlier transaction of this run") as caught:
        user.complete(run.task)
    assert not isinstance(caught.value, TaskLost)
    user.rollback()
    run.end()
    wait_counted(puppet.consumer, completed=1)
    with pytest.raises(CompletionError, match="its handler has ended"):
        user.complete(run.task)


def test_a_handler_that_has_ended_completes_nothing(lab: Lab, play: Play, user: User, insert: str) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    run.end()
    wait_counted(puppet.consumer, completed=1)
    user.execute(insert)
    with pytest.raises(CompletionError, match="its handler has ended; roll the transaction back"):
        user.complete(run.task)
    puppet.stop()
    with pytest.raises(CompletionError, match="its handler has ended"):
        user.complete(run.task)


def test_a_call_that_comes_through_after_the_verdict_is_refused(lab: Lab, play: Play, dsn: str, insert: str) -> None:
    """Another thread of the handler is in the call when the handler returns; its statement comes when nobody waits for it any more."""
    lab.enqueue("t", max_attempts=1)
    puppet = play()
    run = puppet.next()
    conn = psycopg.connect(dsn)
    conn.execute(insert.encode())
    with conn.lock:
        late = Background(lambda: run.task.complete_tx(conn))
        wait_until(lambda: TxCompletion(run.task).is_sent)
        run.end()
        lab.wait_for(failed=1)
    with pytest.raises(CompletionError):
        late.result()
    conn.rollback()
    conn.close()
    assert effects(lab) == 0
    wait_counted(puppet.consumer, failed=1)


def test_a_type_that_keeps_results_says_so(lab: Lab, play: Play, user: User, dsn: str, migrated: str) -> None:
    [id_] = lab.enqueue("t")
    puppet = play(options={"result_ttl": 60})
    run = puppet.next()
    with pytest.raises(CompletionError, match=r"keeps results \(result_ttl\), and the result is stored with"):
        user.complete(run.task)
    run.end()
    lab.wait_for(completed=1)
    with Client(dsn, schema=migrated) as client:
        assert client.wait(id_, timeout=10) is None


def test_another_database_is_refused(lab: Lab, play: Play, dsn: str) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    with psycopg.connect(make_conninfo(dsn, dbname="postgres")) as other, pytest.raises(psycopg.Error) as caught:
        run.do(lambda: run.task.complete_tx(other))
    assert caught.value.sqlstate in ("3F000", "42P01")
    assert "must be to the database in which the task's consumer works" in caught.value.__notes__[0]
    # What the transaction was, this run's effects were not: it has failed, if it swallows that.
    run.end()
    assert puppet.next().task.attempt == 2


def test_another_server_with_the_same_tables_is_refused(lab: Lab, play: Play) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    with PrivateServer() as server:
        migrate(server.dsn, schema=lab.schema)
        with psycopg.connect(server.dsn) as other, pytest.raises(CompletionError, match="another server or database"):
            run.do(lambda: run.task.complete_tx(other))
    run.end(ValueError("let pass"))
    assert puppet.next().task.attempt == 2


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("kind", [PsycopgUser, AsyncpgUser], ids=lambda kind: kind.name)
def test_a_snapshot_of_its_own_must_show_the_claim(
    lab: Lab, play: Play, dsn: str, insert: str, level: str, kind: type[User]
) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    with user_of(kind, lab.producer, dsn) as user:
        user.rollback()
        user.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        user.execute(insert)
        with pytest.raises(CompletionError, match="complete_tx must be the transaction's first statement") as caught:
            user.complete(run.task)
        assert not isinstance(caught.value, TaskLost)
        user.rollback()
        user.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        user.complete(run.task)
        user.execute(insert)
        user.commit()
    run.end()
    wait_counted(puppet.consumer, completed=1)
    assert effects(lab) == 1


# --- what else a completion does ---------------------------------------------------------------------


def test_a_token_is_free_with_the_commit(lab: Lab, play: Play, user: User) -> None:
    puppet = play()

    def enqueue() -> tuple[int, bool]:
        return lab.producer.enqueue(Task("t", idempotency_token="k", token_until="ended"))

    first = enqueue()
    run = puppet.next()
    user.complete(run.task)
    assert enqueue() == (first[0], False)
    user.commit()
    id_, is_new = enqueue()
    assert is_new
    run.end()
    puppet.next().end()
    lab.wait_for(completed=2)
    assert set(lab.completions()) == {first[0], id_}


def test_a_queue_that_keeps_nothing(lab: Lab, play: Play, user: User) -> None:
    """Deleted before the handler has ended, it still has completed, and once."""
    puppet = play(queue_retention={"brief": Retention(completed=0)})
    lab.enqueue("t", queue="brief")
    run = puppet.next()
    user.complete(run.task)
    user.commit()
    wait_until(lambda: states(lab.db) == {}, message="its deletion")
    assert not run.task.is_cancelled()
    run.end()
    wait_counted(puppet.consumer, completed=1)


def test_a_handler_that_never_calls_it_costs_no_statement(lab: Lab, play: Play) -> None:
    links = lab.links()
    puppet = play(dsn=links.dsn, poll_interval=60, heartbeat_interval=60, dead_after=300, lease=120, upkeep=False)
    lab.enqueue("t")
    puppet.next().end()
    wait_counted(puppet.consumer, completed=1)
    sent = b"".join(links.requests.values())
    assert _engine.render("INSERT INTO fastq.done", lab.schema).encode() in sent
    own = "AS s (no, id, own)"
    assert own in _engine.queries()["part_claims"]
    assert own.encode() not in sent


def test_the_time_that_the_run_took_is_kept(lab: Lab, play: Play, user: User) -> None:
    lab.enqueue("t")
    run = play().next()
    claimed_at = lab.value("SELECT claimed_at FROM claim")
    wait_until(lambda: (lab.value("SELECT clock_timestamp()") - claimed_at).total_seconds() > 0.3)
    user.complete(run.task)
    user.commit()
    assert 100_000 < lab.value("SELECT took_us FROM done") < 20_000_000
    run.end()


def test_info_of_a_task_without_an_engine_is_not_made_up(lab: Lab, play: Play, user: User, tmp_path: Path) -> None:
    """In a forked child nobody runs that could see to it."""
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    seen = tmp_path / "seen"

    def fork() -> None:
        child = os.fork()
        if child == 0:
            try:
                run.task.complete_tx(object())
            except BaseException as error:  # noqa: BLE001 told to the parent
                seen.write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    run.do(fork)
    assert "is run by the parent of this forked process" in seen.read_text()
    user.complete(run.task)
    user.commit()
    run.end()
    wait_counted(puppet.consumer, completed=1)


def test_many_at_once(lab: Lab, dsn: str, insert: str, migrated: str) -> None:
    """Each in its own transaction, a third rolled back the first time, beside as many that call nothing."""

    def handle(task: TaskInfo) -> None:
        if task.payload["tx"]:
            with psycopg.connect(dsn) as conn:
                conn.execute(insert.encode())
                task.complete_tx(conn)
                if task.attempt == 1 and task.id % 3 == 0:
                    raise ValueError("no")

    consumer = lab.consumer(handle, concurrency=8, dead_after=30)
    ids = lab.enqueue(*({"tx": n % 2 == 0} for n in range(400)))
    lab.wait_for(completed=400, within=120)
    failed = {attempt[0] for attempt in lab.all("SELECT id FROM attempt_error")}
    assert failed == {id_ for n, id_ in enumerate(ids) if n % 2 == 0 and id_ % 3 == 0}
    assert effects(lab) == 200
    wait_counted(consumer, completed=400, retried=len(failed))
    assert set(lab.completions()) == set(ids)
    assert lab.value("SELECT count(*) FROM claim") == 0


def test_a_producers_task_and_a_completion_share_a_transaction(lab: Lab, play: Play, dsn: str) -> None:
    """What a handler enqueues in its transaction is there once, too."""
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    with Producer(dsn, schema=lab.schema) as producer, psycopg.connect(dsn) as conn:
        producer.enqueue_tx(conn, Task("other"))
        run.do(lambda: run.task.complete_tx(conn))
        conn.rollback()
        producer.enqueue_tx(conn, Task("other"))
        run.do(lambda: run.task.complete_tx(conn))
    run.end()
    lab.wait_for(completed=1, pending=1)
    wait_counted(puppet.consumer, completed=1)
