"""The archive on whole engines: for which consumers, queues and ends it is on, and that each task is in it once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fastq import Client, Consumer, Retention, SettingsError, Task, TaskInfo, TaskNotFound
from tests.support.consuming import states
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


def archived(lab: Lab) -> list[int]:
    """The ids in the archive, as often as they are in it."""
    return [id_ for (id_,) in lab.all("SELECT id FROM archive ORDER BY id")]


def _wait_until_archived(lab: Lab, ids: list[int]) -> None:
    wait_until(lambda: archived(lab) == sorted(ids), timeout=30, message="all of them in the archive, once")


def fail_if_told(task: TaskInfo) -> None:
    if task.payload == "fail":
        raise ValueError("as told")


def test_all_that_retention_removes_is_in_the_archive_once(lab: Lab) -> None:
    consumer = lab.consumer(fail_if_told, completed_retention=0.5, failed_retention=0.5, archive=True)
    ids = lab.enqueue(*({"n": n} for n in range(1500)), max_attempts=2)
    ids += lab.enqueue("fail", "fail", max_attempts=2)
    ids += [lab.producer.enqueue(Task("t", b"\x00raw", queue="audit", priority=3)).id]
    lab.enqueue_others("waits")
    # One leaf after the other, while work comes in.
    for _ in range(3):
        ids += lab.enqueue(count=300)
        _wait_until_archived(lab, ids)
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 1, timeout=30, message="all leaves empty")
    assert states(lab.db) == {"pending": 1}
    rows = lab.all("SELECT state, attempts, error, count(*) FROM archive GROUP BY 1, 2, 3 ORDER BY 1, 2, 3")
    assert rows == [("completed", 1, None, 2401), ("failed", 2, "ValueError: as told", 2)]
    assert lab.all("SELECT queue, priority, format::text, payload FROM archive WHERE format = 'b'") == [
        ("audit", 3, "b", b"\x00raw")
    ]
    assert lab.value("SELECT payload FROM archive WHERE id = %s", ids[7]) == b'{"n":7}'
    with Client(lab.dsn, schema=lab.schema) as client, pytest.raises(TaskNotFound):
        client.get_task(ids[0])
    consumer.stop()
    assert archived(lab) == sorted(ids)


def test_a_leaf_that_could_not_be_emptied_is_not_copied_twice(lab: Lab) -> None:
    """The worker that has copied it is killed before the leaf is empty; two others go on."""
    lab.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'not yet'; END$$"
    )
    lab.db.execute("CREATE TRIGGER refuse BEFORE TRUNCATE ON task_00 EXECUTE FUNCTION refuse()")
    worker = lab.worker(completed_retention=0.5, archive=True)
    ids = lab.enqueue(count=1200)
    wait_until(lambda: "not yet" in worker.log, timeout=30)
    wait_until(lambda: archived(lab) == sorted(ids), timeout=30)
    worker.kill()
    assert lab.value("SELECT count(*) FROM task_00") == 1200
    lab.db.execute("DROP TRIGGER refuse ON task_00")
    for _ in range(2):
        lab.consumer(Runs(), completed_retention=0.5, archive=True)
    more = lab.enqueue(count=100)
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0, timeout=30)
    assert archived(lab) == sorted([*ids, *more])


def test_what_completes_behind_the_copy_is_archived_too(lab: Lab) -> None:
    """Forced: a completion that lies before the one that is being copied comes with that copy. The leaf must not go now."""
    worker = lab.consumer(Runs(), upkeep=False)
    [late] = lab.enqueue(None)
    lab.wait_for(completed=1)
    lab.db.execute("CREATE TABLE aside AS SELECT * FROM done")
    lab.db.execute("DELETE FROM done")
    [first] = lab.enqueue(None)
    lab.wait_for(completed=1)
    assert late < first
    lab.db.execute(
        "CREATE FUNCTION come() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        "WITH a AS (DELETE FROM aside RETURNING *) INSERT INTO done SELECT * FROM a; RETURN NULL; END$$"
    )
    lab.db.execute(sql.SQL("ALTER FUNCTION come() SET search_path = {}").format(sql.Identifier(lab.schema)))
    lab.db.execute("CREATE TRIGGER come AFTER DELETE ON done_00 FOR EACH ROW EXECUTE FUNCTION come()")
    worker.stop()
    lab.consumer(completed_retention=0.5, archive=True)
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0, timeout=30)
    assert archived(lab) == [late, first]


def test_a_leaf_that_can_not_be_emptied_yet_is_looked_through_once(lab: Lab) -> None:
    """One of its tasks runs still. What a queue keeps in it that archives nothing is passed by once, not in each round."""
    runs = Runs()
    rules = {"archived": Retention(archive=True)}
    consumer = lab.consumer(runs, completed_retention=0.5, failed_retention=0.5, queue_retention=rules)
    [running] = lab.enqueue("hold")
    wait_until(lambda: running in runs.ids)
    kept = 50_000
    lab.db.execute(
        "INSERT INTO done (lo, consumer, no, done_at, took_us, lane, leaf, attempts, ids) "
        "SELECT i, 1, i, clock_timestamp() - interval '1 minute', 1, (SELECT id FROM lane WHERE type = 't'), "
        "(SELECT leaf FROM claim), 1, int8multirange(int8range(i, i + 1)) FROM generate_series(1000000, 1000000 + %s - 1) i",
        [kept],
    )
    archived_id = lab.producer.enqueue(Task("t", queue="archived")).id
    _wait_until_archived(lab, [archived_id])

    def statements_of_rounds() -> int:
        """Rounds are a second apart, heartbeats a fifth: of four rounds."""
        before = consumer.stats()
        wait_until(lambda: consumer.stats()["beats"] >= before["beats"] + 20)
        return int(consumer.stats()["statements"] - before["statements"])

    # A look through takes a hundred statements, all else that a consumer does in this time little more.
    wait_until(
        lambda: statements_of_rounds() < kept // 500 * 3 // 2, timeout=60, message="rounds that look at nothing again"
    )
    assert lab.value("SELECT count(*) FROM done WHERE lo >= 1000000") == kept
    runs.release.set()
    wait_until(lambda: lab.value("SELECT count(*) FROM done WHERE lo >= 1000000") == 0, timeout=30)


def test_what_cannot_be_archived_stays(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody has dropped the table: nothing is removed until it is back, and everything else goes on."""
    caplog.set_level("INFO", "fastq")
    lab.db.execute("ALTER TABLE archive RENAME TO elsewhere")
    runs = Runs()
    lab.consumer(runs, completed_retention=0.5, failed_retention=0.5, archive=True)
    ids = lab.enqueue(count=10)
    lab.wait_for(completed=10)
    wait_until(lambda: "old tasks can't be forgotten" in caplog.text)
    [late] = lab.enqueue("late")
    wait_until(lambda: late in runs.ids)
    lab.wait_for(completed=11)
    lab.db.execute("ALTER TABLE elsewhere RENAME TO archive")
    wait_until(lambda: archived(lab) == sorted([*ids, late]))
    wait_until(lambda: "old tasks can be forgotten again" in caplog.text)


def test_by_outcome_and_by_queue(lab: Lab) -> None:
    lab.consumer(
        fail_if_told,
        completed_retention=0.5,
        failed_retention=0.5,
        cancelled_retention=0.5,
        archive=["failed", "cancelled"],
        queue_retention={
            "audit": Retention(archive=True),
            "cache": Retention(completed=timedelta(0), archive=("completed",)),
            "noise": Retention(failed=0, archive=False),
        },
    )
    expected = []
    for queue, kept in (
        ("default", {"failed"}),
        ("audit", {"completed", "failed"}),
        ("cache", {"completed"}),
        ("noise", ()),
    ):
        good = lab.enqueue("fine", "fine", queue=queue)
        bad = lab.enqueue("fail", queue=queue, max_attempts=1)
        expected += good if "completed" in kept else []
        expected += bad if "failed" in kept else []
    [cancelled] = lab.enqueue_others("never")
    with Client(lab.dsn, schema=lab.schema) as client:
        client.cancel_task(cancelled)
    expected.append(cancelled)
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0, timeout=30)
    wait_until(lambda: states(lab.db) == {}, timeout=30)
    assert archived(lab) == sorted(expected)
    assert dict(lab.all("SELECT state, count(*) FROM archive GROUP BY state")) == {
        "completed": 4,
        "failed": 2,
        "cancelled": 1,
    }


def test_nothing_is_archived_unless_it_is_asked_for(lab: Lab) -> None:
    lab.consumer(fail_if_told, completed_retention=0.5, failed_retention=0.5)
    lab.enqueue(count=100)
    lab.enqueue("fail", max_attempts=1)
    wait_until(lambda: lab.value("SELECT count(*) FROM task") == 0, timeout=30)
    wait_until(lambda: states(lab.db) == {}, timeout=30)
    assert archived(lab) == []


@pytest.mark.parametrize("value", ["failed", 1, None, ["lost"], [None], b"failed", {"failed", 7}])
def test_a_wrong_archive_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="archive"):
        Consumer("postgresql://nowhere", archive=value)
    if value is not None:
        with pytest.raises(SettingsError, match="archive"):
            Retention(archive=value)
