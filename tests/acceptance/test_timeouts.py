"""The end of a run's time, as an action: by a real consumer, against nobody and against a cancel in flight. And what a task says of its
own runs: its timeout ends them, its policy retries them, whatever its type and its consumer have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import psycopg
import pytest

from fastq import ConstantBackoff, Consumer, TaskInfo
from fastq.client import Client
from tests.acceptance.stage import ACTORS, Kind
from tests.support.consuming import new_consumer
from tests.support.lab import QUICK, Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.mark.parametrize(("max_attempts", "place"), [(1, ("failed", None)), (2, ("pending", "retrying"))])
def test_running_idle(lab: Lab, max_attempts: int, place: tuple[str, str | None]) -> None:
    runs = Runs()
    lab.consumer(runs, timeout=0.2, retry_policy=ConstantBackoff(60))
    [id_] = lab.enqueue("hold", max_attempts=max_attempts)
    with Client(lab.dsn, schema=lab.schema) as client:
        wait_until(lambda: client.get_task(id_).errors)
        record = client.get_task(id_)
    assert (record.state, record.kind) == place
    assert runs.ids == [id_]


@pytest.mark.parametrize(("whose", "commit"), [("type's", True), ("own", False)], ids=["commit", "rollback"])
def test_running_racing_a_cancel(lab: Lab, whose: str, *, commit: bool) -> None:
    runs = Runs()
    consumer = lab.consumer(runs, timeout=4.0 if whose == "type's" else None)
    [id_] = lab.enqueue("hold", max_attempts=1, timeout=4.0 if whose == "own" else None)
    wait_until(lambda: runs.ids == [id_])
    with Client(lab.dsn, schema=lab.schema) as client, psycopg.connect(lab.dsn) as connection:
        assert client.cancel_task_tx(connection, id_).state == "cancelled"
        pid = connection.info.backend_pid
        wait_until(
            lambda: lab.value("SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))", pid) == 1,
            message="the failure to wait for the cancel",
        )
        if commit:
            connection.commit()
            wait_until(lambda: consumer.stats()["refused"] == 1)
        else:
            connection.rollback()
            wait_until(lambda: client.get_task(id_).state != "running")
        record = client.get_task(id_)
    assert (record.state, len(record.errors or ())) == (("cancelled", 0) if commit else ("failed", 1))


def test_a_cancelled_run_that_runs_out_of_time_stays_cancelled(lab: Lab) -> None:
    runs = Runs()
    consumer = lab.consumer(runs, timeout=0.6)
    [id_] = lab.enqueue("hold", max_attempts=3)
    wait_until(lambda: runs.ids == [id_])
    with Client(lab.dsn, schema=lab.schema) as client:
        client.cancel_task(id_)
        wait_until(lambda: consumer.stats()["cancelled"] == 1)
        running = consumer._running
        assert running is not None
        wait_until(lambda: running.engine.running == 0, message="its place to be free")
        record = client.get_task(id_)
    assert (record.state, record.errors, runs.ids) == ("cancelled", (), [id_])


# --- a task's own --------------------------------------------------------------------------------------

Work: TypeAlias = Callable[..., Consumer]
Failing: TypeAlias = Literal["raises", "runs out of time", "rolls back"]

#: The type's timeout and the task's own, and whether a run that lasts is ended by them.
_TIMEOUTS: Final = ((60.0, 0.2, True), (None, 0.2, True), (0.2, None, True), (0.2, 60.0, False))
#: Seconds until the retry, by the consumer's policy, the type's and the task's own; and which of them it is.
_DELAYS: Final = (
    (7200, None, None, 7200),
    (7200, 3600, None, 3600),
    (7200, 3600, 60, 60),
    (7200, None, 60, 60),
    (60, 3600, 7200, 7200),
)


@pytest.fixture
def runs() -> Iterator[Runs]:
    """At the end nobody waits any more."""
    runs = Runs()
    yield runs
    runs.release.set()


@pytest.fixture
def work(lab: Lab) -> Iterator[Work]:
    """Starts a consumer whose handler of type ``t`` has these options."""
    with ExitStack() as stack:

        def start(handler: Callable[[TaskInfo], Any], *, retry: float = 0.0, **options: Any) -> Consumer:
            consumer = new_consumer(lab.dsn, lab.schema, **QUICK, retry_policy=ConstantBackoff(retry))
            consumer.add_handler("t", handler, **options)
            consumer.start()
            stack.callback(consumer.stop, 5)
            return consumer

        yield start


def holding(kind: Kind, runs: Runs) -> Callable[[TaskInfo], Any]:
    """These runs, on a thread or as coroutines."""

    async def handle(task: TaskInfo) -> None:
        await asyncio.to_thread(runs, task)

    return runs if kind == "sync" else handle


def failing(kind: Kind, how: Failing, dsn: str, runs: Runs) -> Callable[[TaskInfo], Any]:
    """A handler whose attempts fail in this way."""

    def handle(task: TaskInfo) -> None:
        if how == "raises":
            raise ValueError("no")
        if how == "runs out of time":
            assert runs.release.wait(60)
            return
        with psycopg.connect(dsn) as connection:
            task.complete_tx(connection)
            connection.rollback()

    async def handle_async(task: TaskInfo) -> None:
        if how == "raises":
            raise ValueError("no")
        if how == "runs out of time":
            await asyncio.Event().wait()
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            await task.acomplete_tx(connection)
            await connection.rollback()

    return handle if kind == "sync" else handle_async


@pytest.mark.parametrize("kind", list(ACTORS))
@pytest.mark.parametrize(("types", "own", "ends"), _TIMEOUTS)
def test_a_tasks_own_timeout_wins(
    lab: Lab, work: Work, runs: Runs, kind: Kind, types: float | None, own: float | None, *, ends: bool
) -> None:
    work(holding(kind, runs), timeout=types)
    [id_] = lab.enqueue("hold", max_attempts=1, timeout=own)
    wait_until(lambda: runs.ids == [id_])
    with Client(lab.dsn, schema=lab.schema) as client:
        if ends:
            wait_until(lambda: client.get_task(id_).errors)
            assert client.get_task(id_).state == "failed"
            return
        # One that begins later, and has its type's, is over before it.
        [later] = lab.enqueue("hold", max_attempts=1)
        wait_until(lambda: client.get_task(later).state == "failed")
        assert client.get_task(id_).state == "running"
        runs.release.set()
        wait_until(lambda: client.get_task(id_).state == "completed")


@pytest.mark.parametrize("kind", list(ACTORS))
@pytest.mark.parametrize("how", get_args(Failing))
@pytest.mark.parametrize(("consumers", "types", "own", "delay"), _DELAYS)
def test_a_tasks_own_policy_wins(
    lab: Lab,
    work: Work,
    runs: Runs,
    dsn: str,
    kind: Kind,
    how: Failing,
    consumers: float,
    types: float | None,
    own: float | None,
    delay: float,
) -> None:
    def policy(seconds: float | None) -> ConstantBackoff | None:
        return None if seconds is None else ConstantBackoff(seconds)

    began_at = lab.value("SELECT clock_timestamp()")
    timeout = 0.2 if how == "runs out of time" else None
    work(failing(kind, how, dsn, runs), retry=consumers, retry_policy=policy(types), timeout=timeout)
    [id_] = lab.enqueue(None, max_attempts=2, retry=policy(own))
    with Client(lab.dsn, schema=lab.schema) as client:
        wait_until(lambda: client.get_task(id_).errors)
        record = client.get_task(id_)
    assert (record.state, record.kind, record.attempts) == ("pending", "retrying", 1)
    due_in = (record.run_at - began_at).total_seconds()
    took = (lab.value("SELECT clock_timestamp()") - began_at).total_seconds()
    assert delay <= due_in <= delay + took
