"""A task that is completed in its handler's own transaction, while others want it, or its worker or the worker's connection ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from fastq import (
    Client,
    CompletionError,
    InvalidTransition,
    TaskLost,
)
from tests.support.completing import Play, complete_one, counted, effects, playing, wait_counted, wait_until_idle
from tests.support.consuming import errors, start_python, states
from tests.support.lab import Lab, Runs
from tests.support.producing import Background, value
from tests.support.users import AsyncpgUser, PsycopgUser, User, user_of
from tests.support.waiting import wait_until


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


# --- others who want the task ----------------------------------------------------------------------


@contextmanager
def client_of(lab: Lab) -> Iterator[Client]:
    with Client(lab.dsn, schema=lab.schema) as client:
        yield client


def wait_until_blocked(lab: Lab, user: User) -> None:
    wait_until(
        lambda: lab.value("SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))", user.pid)
    )


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_cancel_waits_for_the_transaction_to_decide(lab: Lab, play: Play, user: User, insert: str, end: str) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.execute(insert)
    user.complete(run.task)
    with client_of(lab) as client:
        cancel = Background(lambda: client.cancel_task(id_))
        wait_until_blocked(lab, user)
        getattr(user, end)()
        if end == "commit":
            with pytest.raises(InvalidTransition) as caught:
                cancel.result()
            assert caught.value.task.state == "completed"
        else:
            assert cancel.result().state == "cancelled"
            with pytest.raises(TaskLost, match="it was cancelled, its time is up, or others have it"):
                user.complete(run.task)
            user.rollback()
    run.end()
    lab.wait_for(**{"completed" if end == "commit" else "cancelled": 1})
    wait_counted(puppet.consumer, **{"completed" if end == "commit" else "refused": 1})
    assert effects(lab) == (end == "commit")


@pytest.mark.parametrize("kind", [PsycopgUser, AsyncpgUser], ids=lambda kind: kind.name)
def test_a_task_that_was_cancelled_before_is_lost(
    lab: Lab, play: Play, dsn: str, insert: str, kind: type[User]
) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    with client_of(lab) as client, user_of(kind, lab.producer, dsn) as user:
        user.execute(insert)
        client.cancel_task(id_)
        with pytest.raises(TaskLost):
            user.complete(run.task)
        user.rollback()
    assert effects(lab) == 0
    assert states(lab.db) == {"cancelled": 1}


def test_a_cancel_reaches_a_run_that_has_a_claim_of_its_own(lab: Lab, play: Play, dsn: str) -> None:
    [id_] = lab.enqueue("t")
    puppet = play(listen=False)
    run = puppet.next()
    with psycopg.connect(dsn, autocommit=True) as conn, pytest.raises(CompletionError, match="autocommit"):
        run.do(lambda: run.task.complete_tx(conn))
    with client_of(lab) as client:
        client.cancel_task(id_)
    wait_until(run.task.is_cancelled)
    run.end()
    wait_counted(puppet.consumer, refused=1)


@pytest.mark.parametrize("listen", [True, False], ids=["told", "looks"])
def test_nobody_takes_a_long_run_for_cancelled(lab: Lab, play: Play, user: User, listen: bool) -> None:
    """Its claim is not where it was, then it is gone: both look like a cancel to who only counts claims."""
    ids = lab.enqueue(*range(3))
    puppet = play(listen=listen, concurrency=3)
    runs = [puppet.next() for _ in ids]
    user.complete(runs[0].task)
    with client_of(lab) as client:
        client.cancel_task(runs[1].task.id)
    wait_until(runs[1].task.is_cancelled)
    assert not runs[0].task.is_cancelled()
    user.commit()
    asked = puppet.consumer.stats()["statements"]
    wait_until(lambda: puppet.consumer.stats()["statements"] >= asked + 20)
    assert not runs[0].task.is_cancelled()
    assert not runs[2].task.is_cancelled()
    for run in runs:
        run.end()
    wait_counted(puppet.consumer, completed=2, refused=1)
    assert puppet.consumer.stats()["cancelled"] == 1


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_rescue_leaves_an_open_transaction_alone(lab: Lab, play: Play, user: User, insert: str, end: str) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    me = lab.consumer_id()
    user.execute(insert)
    user.complete(run.task)
    others = Runs()
    rescuer = lab.consumer(others)
    # It registers anew, and may well be the one that runs it again.
    puppet.free()
    lab.declare_dead(me)
    [other] = lab.enqueue("other")
    run.end()
    lab.wait_for(completed=1, running=1)
    wait_until(lambda: rescuer.stats()["beats"] > 3 and puppet.consumer.stats()["beats"] > 3)
    assert set(lab.completions()) == {other}
    getattr(user, end)()
    lab.wait_for(completed=2)
    assert set(lab.completions()) == {id_, other}
    again = [*others.ids, *(run.task.id for run in puppet.runs[1:])]
    assert sorted(again) == ([id_, other] if end == "rollback" else [other])
    assert effects(lab) == (end == "commit")


def test_a_run_that_was_rescued_can_complete_nothing(lab: Lab, play: Play, user: User, insert: str) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    others = Runs()
    me = lab.consumer_id()
    puppet.free()
    lab.declare_dead(me)
    lab.consumer(others)
    wait_until(lambda: not lab.claimed(me), message="the rescue")
    user.execute(insert)
    with pytest.raises(TaskLost):
        user.complete(run.task)
    user.rollback()
    run.end()
    assert effects(lab) == 0
    lab.wait_for(completed=1)
    assert set(lab.completions()) == {id_}


_STOPPED = """
import sys
import threading
import psycopg
from fastq import ConstantBackoff, Consumer
ended = threading.Event()
consumer = Consumer(dsn, schema=schema, heartbeat_interval=0.2, dead_after=1.2, lease=0.6, poll_interval=0.2,
                    retry_policy=ConstantBackoff(0.0), upkeep=False)

@consumer.handler("t")
def handle(task):
    with psycopg.connect(dsn) as conn:
        conn.execute(f'INSERT INTO "{schema}".effect VALUES (1)')
        if sys.stdin.readline() == "part\\n":
            conn.execute("SAVEPOINT x")
            task.complete_tx(conn)
            conn.execute("ROLLBACK TO SAVEPOINT x")
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            task.complete_tx(conn)
        except BaseException as error:
            print(type(error).__name__, flush=True)
            raise
        finally:
            ended.set()

consumer.start()
print("up", flush=True)
ended.wait()
consumer.stop(0)
"""


@pytest.mark.parametrize("moved", [False, True], ids=["before it was moved", "after it was moved"])
def test_a_worker_that_stood_still_past_its_death_rolls_back(lab: Lab, moved: bool) -> None:
    """Stopped (SIGSTOP), declared dead, its task done by another; then it goes on as if nothing had been."""
    code = f"dsn, schema = {lab.dsn!r}, {lab.schema!r}\n{_STOPPED}"
    process = start_python(code, stdin=subprocess.PIPE, stderr=None)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        [id_] = lab.enqueue("t")
        process.stdin.write("part\n" if moved else "go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        me = lab.consumer_id(pid=process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        others = Runs()
        lab.consumer(others)
        wait_until(lambda: others.ids == [id_], timeout=30, message="the rescue")
        lab.wait_for(completed=1)
        assert not lab.claimed(me)
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "TaskLost\n"
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    assert effects(lab) == 0
    assert set(lab.completions()) == {id_}


# --- the worker's own connection -------------------------------------------------------------------


def test_a_move_whose_answer_is_lost_is_found(lab: Lab, play: Play, user: User) -> None:
    links = lab.links()
    puppet = play(dsn=links.dsn)
    complete_one(lab, puppet, user)
    lab.enqueue("t")
    run = puppet.next()
    [(before,)] = lab.all("SELECT no FROM claim")
    links.hold_answers("complete")
    completing = user.start(lambda: user.call_complete(run.task))
    links.wait_for_answer("complete")
    [(no,)] = lab.all("SELECT no FROM claim")
    assert no != before
    links.cut("complete")
    completing.result(30)
    assert lab.all("SELECT no FROM claim") == [(no,)]
    user.commit()
    run.end()
    lab.wait_for(completed=2)
    wait_counted(puppet.consumer, completed=2)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_verdict_whose_answer_is_lost_is_asked_for_again(lab: Lab, play: Play, user: User, end: str) -> None:
    links = lab.links()
    puppet = play(dsn=links.dsn)
    complete_one(lab, puppet, user)
    lab.enqueue("t")
    run = puppet.next()
    user.complete(run.task)
    getattr(user, end)()
    links.hold_answers("complete")
    run.end()
    links.wait_for_answer("complete")
    links.cut("complete")
    if end == "commit":
        wait_counted(puppet.consumer, completed=2)
        lab.wait_for(completed=2)
    else:
        assert puppet.next().task.attempt == 2
        wait_counted(puppet.consumer, completed=1, retried=1)
        assert [error.partition(":")[0] for _, error, _ in errors(lab.db)] == ["CompletionError"]


def test_a_handler_that_ends_while_its_move_is_under_way_is_not_lost(lab: Lab, play: Play, user: User) -> None:
    links = lab.links()
    puppet = play(dsn=links.dsn)
    complete_one(lab, puppet, user)
    lab.enqueue("t")
    run = puppet.next()
    links.hold_answers("complete")
    completing = user.start(lambda: user.call_complete(run.task))
    links.wait_for_answer("complete")
    run.end()
    wait_until_idle(puppet.consumer)
    links.cut("complete")
    with pytest.raises(CompletionError, match="its handler has ended"):
        completing.result(30)
    user.rollback()
    lab.wait_for(completed=2)
    wait_counted(puppet.consumer, completed=2)


# --- the end of the worker -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_stop_waits_for_an_open_transaction_no_longer_than_its_time(
    lab: Lab, play: Play, user: User, insert: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    [id_] = lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.execute(insert)
    user.complete(run.task)
    run.end()
    wait_until_idle(puppet.consumer)
    with caplog.at_level(logging.WARNING, "fastq"):
        stopping = Background(lambda: puppet.consumer.stop(1.0))
        stopping.result(5)
    assert "waits no longer for the transactions that are to complete 1 tasks" in caplog.text
    getattr(user, end)()
    others = Runs()
    lab.consumer(others)
    lab.wait_for(completed=1)
    assert others.ids == ([id_] if end == "rollback" else [])
    assert effects(lab) == (end == "commit")


def test_a_stop_waits_for_a_transaction_that_ends_in_time(lab: Lab, play: Play, user: User) -> None:
    lab.enqueue("t")
    puppet = play()
    run = puppet.next()
    user.complete(run.task)
    run.end()
    stopping = Background(lambda: puppet.consumer.stop(20))
    wait_until(lambda: lab.value("SELECT count(*) FROM consumer WHERE stopping") == 1)
    assert not stopping.is_done
    user.commit()
    stopping.result()
    assert counted(puppet.consumer, completed=1)
    assert states(lab.db) == {"completed": 1}
    assert lab.value("SELECT count(*) FROM consumer") == 0
