"""Rule 6 beyond results: what fails for one member of an enqueue, a promotion, a claim, a rescue or a clean-up harms none of the others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fastq import DatabaseError, Task
from tests.support.lab import Lab, Runs
from tests.support.producing import Background
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


def _fail_for(lab: Lab, table: str, condition: sql.Composable) -> None:
    """No row that meets the condition gets into the table."""
    lab.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no such row here'; END$$"
    )
    lab.db.execute(
        sql.SQL("CREATE TRIGGER refuse BEFORE INSERT ON {} FOR EACH ROW WHEN ({}) EXECUTE FUNCTION refuse()").format(
            sql.Identifier(table), condition
        )
    )


def _wait_until_quiet(lab: Lab, consumer: object, statements: int) -> None:
    """Nothing loops: in three heartbeats there are no more statements than heartbeats, ticks and polls need."""
    stats = consumer.stats  # type: ignore[attr-defined]
    while True:
        before = stats()
        wait_until(lambda before=before: stats()["beats"] >= before["beats"] + 3)  # type: ignore[misc]
        if stats()["statements"] - before["statements"] <= statements:
            return


def test_a_task_that_can_not_be_enqueued_fails_its_own_call(lab: Lab) -> None:
    lab.enqueue(0)
    _fail_for(lab, "task", sql.SQL("convert_from(NEW.payload, 'UTF8') = '333'"))
    calls = [Background(partial(lab.producer.enqueue, Task("t", n))) for n in range(1, 501)]
    for n, call in enumerate(calls, 1):
        if n == 333:
            with pytest.raises(DatabaseError, match="no such row here") as caught:
                call.result()
            assert caught.value.sqlstate == "P0001"
        else:
            assert call.result().is_new
    assert lab.value("SELECT count(*) FROM tasks") == 500
    assert lab.value("SELECT count(*) FROM tasks WHERE payload = '333'") == 0


def test_a_bulk_load_with_a_task_that_can_not_be_stored_says_what_is_in(lab: Lab) -> None:
    lab.enqueue(0)
    _fail_for(lab, "task", sql.SQL("convert_from(NEW.payload, 'UTF8') = '333'"))
    # In one transaction: nothing of it.
    with pytest.raises(DatabaseError, match=r"no such row here.*nothing of the call is written"):
        lab.enqueue(*range(1, 501))
    assert lab.value("SELECT count(*) FROM tasks") == 1
    # In several: what was committed before.
    with pytest.raises(DatabaseError, match=r"no such row here.*300 tasks of the call are in and stay"):
        lab.producer.enqueue_many((Task("t", n) for n in range(1, 501)), commit_every=100)
    assert lab.value("SELECT count(*) FROM tasks") == 301
    # And the connection is as good as ever.
    assert len(lab.enqueue(*range(400, 900))) == 500


def test_a_task_that_can_not_be_promoted_keeps_nobody_waiting(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    ids = lab.enqueue(count=500, delay=0.5)
    culprit = ids[333]
    _fail_for(lab, "ready", sql.SQL("NEW.lo <= {0} AND NEW.hi >= {0}").format(sql.Literal(culprit)))
    runs = Runs()
    consumer = lab.consumer(runs)
    wait_until(lambda: len(runs.ids) == 499)
    assert set(runs.ids) == set(ids) - {culprit}
    assert f"task Some({culprit})" in caplog.text or f"task {culprit}" in caplog.text
    _wait_until_quiet(lab, consumer, 30)
    # Put off, not forgotten.
    assert lab.value("SELECT count(*) FROM delayed WHERE id = %s AND run_at > clock_timestamp()", culprit) == 1
    said = caplog.text.count("put off for a minute")
    assert said == 1


def test_a_task_that_can_not_be_rescued_keeps_nobody_waiting(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    # One by one: each is a chunk, and a claim, of its own.
    ids = [lab.producer.enqueue(Task("t")).id for _ in range(500)]
    culprit = ids[333]
    lab.db.execute(
        """WITH taken AS (DELETE FROM ready RETURNING *)
           INSERT INTO claim (consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, ids)
           SELECT 4711, row_number() OVER (ORDER BY rid), lane, track, leaf, attempts, max_attempts, task_bytes,
                  int8multirange(int8range(lo, hi, '[]')) FROM taken"""
    )
    _fail_for(lab, "ready", sql.SQL("NEW.lo <= {0} AND NEW.hi >= {0}").format(sql.Literal(culprit)))
    runs = Runs()
    consumer = lab.consumer(runs)
    wait_until(lambda: len(runs.ids) == 499, timeout=30, message="the other 499")
    assert set(runs.ids) == set(ids) - {culprit}
    _wait_until_quiet(lab, consumer, 30)
    # Named, and not without end; it is still there.
    graves = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    said = [line for line in graves if "rescue" in line]
    assert any(str(culprit) in line for line in said), said
    assert sum("can't be rescued" in line for line in said) <= 2, said
    assert lab.value("SELECT count(*) FROM claim WHERE ids @> %s::bigint", culprit) == 1


@pytest.mark.parametrize("chunk", [500, 1], ids=["in one chunk", "one by one"])
def test_a_task_that_can_not_be_claimed_keeps_nobody_waiting(
    lab: Lab, caplog: pytest.LogCaptureFixture, chunk: int
) -> None:
    ids = lab.enqueue(count=500) if chunk == 500 else [lab.producer.enqueue(Task("t")).id for _ in range(500)]
    culprit = ids[333]
    _fail_for(lab, "claim", sql.SQL("NEW.ids @> {}::bigint").format(sql.Literal(culprit)))
    runs = Runs()
    # Of another type, behind it in the same claims.
    other = Runs()
    consumer = lab.consumer(runs)
    lab.consumer(other, type="u")
    [beside] = [lab.producer.enqueue(Task("u")).id]
    wait_until(lambda: len(runs.ids) == 499 and other.ids == [beside], timeout=30, message="all others")
    assert set(runs.ids) == set(ids) - {culprit}
    _wait_until_quiet(lab, consumer, 30)
    # Put off, not forgotten, and named once.
    assert lab.value("SELECT count(*) FROM delayed WHERE id = %s AND run_at > clock_timestamp()", culprit) == 1
    assert caplog.text.count(f"task {culprit} can't be claimed, and is put off for a minute") == 1
    assert consumer.stats()["claimed"] == 499
    lab.db.execute("DROP TRIGGER refuse ON claim")
    lab.db.execute("UPDATE delayed SET run_at = clock_timestamp()")
    wait_until(lambda: runs.ids[499:] == [culprit])


def test_claims_that_fail_whatever_is_in_them_do_not_put_off_one_task_after_the_other(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [lab.producer.enqueue(Task("t")).id for _ in range(200)]
    _fail_for(lab, "claim", sql.SQL("NEW.no > 0"))
    runs = Runs()
    consumer = lab.consumer(runs)
    wait_until(lambda: "can't claim, and keeps trying: no such row here" in caplog.text)
    before = consumer.stats()
    wait_until(lambda: consumer.stats()["beats"] >= before["beats"] + 10)
    # Three in a row, and one more for each time that it is tried, with growing pauses.
    assert 3 <= lab.value("SELECT count(*) FROM delayed") <= 12
    assert caplog.text.count("can't claim, and keeps trying") == 1
    lab.db.execute("DROP TRIGGER refuse ON claim")
    lab.db.execute("UPDATE delayed SET run_at = clock_timestamp()")
    wait_until(lambda: len(runs.ids) == 200, timeout=30)
    assert set(runs.ids) == set(ids)


@pytest.mark.parametrize("track", [2, 3])
def test_a_careful_task_that_can_not_be_claimed_keeps_nobody_waiting(
    lab: Lab, caplog: pytest.LogCaptureFixture, track: int
) -> None:
    ids = [lab.producer.enqueue(Task("t")).id for _ in range(5)]
    lab.db.execute("UPDATE ready SET track = %s", [track])
    _fail_for(lab, "claim", sql.SQL("NEW.ids @> {}::bigint").format(sql.Literal(ids[1])))
    runs = Runs()
    lab.consumer(runs)
    wait_until(lambda: len(runs.ids) == 4, message="the other four")
    assert set(runs.ids) == set(ids) - {ids[1]}
    assert caplog.text.count(f"task {ids[1]} can't be claimed, and is put off for a minute") == 1
    assert lab.value("SELECT count(*) FROM delayed WHERE id = %s", ids[1]) == 1


def test_a_dead_task_that_can_not_be_forgotten_keeps_no_other_clean_up_waiting(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastq")
    lab.db.execute("INSERT INTO lane (queue, type) VALUES ('default', 't')")
    lab.db.execute(
        "INSERT INTO dead (id, ended_at, created_at, lane, attempts, max_attempts, state, format, payload) "
        "VALUES (1, now() - interval '30 days', now(), 1, 1, 1, 'failed', 'j', 'null')"
    )
    lab.db.execute(
        "INSERT INTO attempt_error (id, failed_at, consumer, no, attempt, error) VALUES (7, now() - interval '30 days', 1, 1, 1, 'e')"
    )
    lab.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'it stays'; END$$"
    )
    lab.db.execute("CREATE TRIGGER refuse BEFORE DELETE ON dead FOR EACH ROW EXECUTE FUNCTION refuse()")
    lab.consumer(completed_retention=1.0)
    wait_until(lambda: lab.value("SELECT count(*) FROM attempt_error") == 0)
    assert lab.value("SELECT count(*) FROM dead") == 1
    lab.db.execute("DROP TRIGGER refuse ON dead")
    wait_until(lambda: lab.value("SELECT count(*) FROM dead") == 0)
    wait_until(lambda: "old tasks can be forgotten again" in caplog.text)
    # Once, however many rounds it lasted, and not over before it was.
    assert caplog.text.count("old tasks can't be forgotten") == 1
    assert caplog.text.count("old tasks can be forgotten again") == 1


def test_content_that_can_not_be_read_keeps_nobody_waiting(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A claim of one task is made before its content is looked for, where that lies in another leaf than the last one's."""
    # Another leaf than a consumer begins with.
    lab.db.execute(
        "UPDATE leaf SET state = CASE no WHEN 0 THEN 'closed' ELSE 'open' END, opened_at = clock_timestamp(), "
        "closed_at = CASE no WHEN 0 THEN clock_timestamp() END WHERE no < 2"
    )
    culprit, *others = [lab.producer.enqueue(Task("t")).id for _ in range(3)]
    assert lab.value("SELECT count(*) FROM task_01") == 3
    lab.db.execute("ALTER TABLE task ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    lab.db.execute(
        "CREATE FUNCTION is_whole(id bigint, bad bigint) RETURNS boolean LANGUAGE plpgsql AS "
        "$$BEGIN IF id = bad THEN RAISE EXCEPTION 'can''t be read' USING ERRCODE = 'XX001'; END IF; RETURN true; END$$"
    )
    lab.db.execute(
        sql.SQL("CREATE POLICY whole ON task USING ({}.is_whole(id, {}))").format(
            sql.Identifier(lab.schema), sql.Literal(culprit)
        )
    )
    runs = Runs()
    consumer = lab.consumer(runs, concurrency=1, heartbeat_interval=60.0, dead_after=200.0, lease=180.0)
    wait_until(lambda: runs.ids == others, message="the others")
    wait_until(lambda: lab.value("SELECT count(*) FROM delayed WHERE id = %s", culprit) == 1, message="it is put off")
    assert consumer.stats()["beats"] == 0, "no heartbeat had to find what the claim left"
    assert caplog.text.count(f"task {culprit} can't be claimed, and is put off for a minute") == 1
    lab.db.execute("DROP POLICY whole ON task")
    lab.db.execute("ALTER TABLE task NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY")
    lab.db.execute("UPDATE delayed SET run_at = clock_timestamp()")
    wait_until(lambda: runs.ids == [*others, culprit])
