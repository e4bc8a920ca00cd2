"""The end of a run's time, as an action: by a real consumer, against nobody and against a cancel in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import ConstantBackoff
from fastq.client import Client
from tests.support.lab import Lab, Runs
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


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
def test_running_racing_a_cancel(lab: Lab, *, commit: bool) -> None:
    runs = Runs()
    consumer = lab.consumer(runs, timeout=4.0)
    [id_] = lab.enqueue("hold", max_attempts=1)
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
