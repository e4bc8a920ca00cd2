"""Rescue on whole engines: what is told of it, and rows that its statements fail for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Consumer
from tests.support.lab import Lab, Runs
from tests.support.storage import Session, Worker, add_lane, enqueue
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


@pytest.fixture
def store(dsn: str, migrated: str) -> Iterator[Session]:
    """A session of the test's own; lane 1 is that of type ``t``."""
    session = Session(dsn, migrated)
    assert add_lane(session) == 1
    yield session
    session.close()


def _said(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """The records that people see, with this text."""
    records = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    return [record.getMessage() for record in records if text in record.getMessage()]


def _wait_until_quiet(consumer: Consumer) -> None:
    """Nothing loops: three heartbeats pass with no more statements than heartbeats, ticks and polls need."""
    while True:
        before = consumer.stats()
        wait_until(lambda before=before: consumer.stats()["beats"] >= before["beats"] + 3)  # type: ignore[misc]
        if consumer.stats()["statements"] - before["statements"] <= 30:
            return


def test_what_was_rescued_of_whom_is_said_once(lab: Lab, store: Session, caplog: pytest.LogCaptureFixture) -> None:
    # Of one consumer more claims than a statement takes; of another that nobody knows.
    ids = enqueue(store, 120, chunk=1)
    lost, unknown = Worker(store, 4711), Worker(store, 4712, register=False)
    for _ in range(110):
        lost.claim(1)
    for _ in range(10):
        unknown.claim(1)
    lost.beat(ids[:3])
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp(), pid = 77 WHERE id = 4711")
    runs = Runs()
    lab.consumer(runs)
    wait_until(lambda: sorted(runs.ids) == list(ids))
    wait_until(lambda: _said(caplog, "consumer 4711") and _said(caplog, "consumer 4712"))
    [one] = _said(caplog, "consumer 4711")
    assert one == (
        "rescued 110 tasks in 110 claims of process 77 on host (consumer 4711), since it was declared dead: "
        "3 were running and are charged (0 of them have failed for good), 107 are not"
    )
    [other] = _said(caplog, "consumer 4712")
    assert other.startswith("rescued 10 tasks in 10 claims of consumer 4712, which is not known")
    wait_until(lambda: lab.value("SELECT count(*) FROM consumer") == 1, message="the dead one forgotten")


def test_a_task_that_can_not_be_rescued_is_found_among_those_of_its_claim(
    lab: Lab, store: Session, caplog: pytest.LogCaptureFixture
) -> None:
    ids = enqueue(store, 1000)
    worker = Worker(store, 4711)
    worker.claim(1000)
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp() WHERE id = 4711")
    culprits = [ids[123], ids[124], ids[999]]
    lab.refuse("ready", "int8range(NEW.lo, NEW.hi, '[]') && int8range({0}, {1}, '[]') OR NEW.hi = {2}", *culprits)
    runs = Runs()
    consumer = lab.consumer(runs)
    wait_until(lambda: len(runs.ids) == 997)
    assert set(runs.ids) == set(ids) - set(culprits)
    wait_until(lambda: _said(caplog, "can't be rescued"))
    _wait_until_quiet(consumer)
    [said] = _said(caplog, "can't be rescued")
    assert said.startswith("3 lost tasks can't be rescued")
    assert all(str(culprit) in said for culprit in culprits)
    assert lab.claimed(4711) == set(culprits)
    # The next leader tries them at once.
    consumer.stop()
    lab.db.execute("DROP TRIGGER refuse ON ready")
    lab.consumer(runs)
    wait_until(lambda: sorted(runs.ids) == list(ids))


def test_a_consumer_that_can_not_be_declared_dead_keeps_no_other_from_it(
    lab: Lab, store: Session, caplog: pytest.LogCaptureFixture
) -> None:
    ids = enqueue(store, 30, chunk=10)
    for id_ in (4711, 4712, 4713):
        Worker(store, id_).claim(10)
    store.sql("UPDATE fastq.consumer SET beat_at = beat_at - interval '1 minute'")
    lab.refuse("consumer", "NEW.id = {0} AND NEW.dead_at IS NOT NULL", 4712, on="UPDATE")
    runs = Runs()
    consumer = lab.consumer(runs)
    # And all other upkeep goes on.
    [later] = lab.enqueue(None, delay=0.1)
    wait_until(lambda: set(runs.ids) == {*ids[:10], *ids[20:], later})
    wait_until(lambda: _said(caplog, "can't be declared dead"))
    _wait_until_quiet(consumer)
    [said] = _said(caplog, "can't be declared dead")
    assert "consumer 4712" in said
    wait_until(lambda: lab.value("SELECT array_agg(id) FROM consumer WHERE id BETWEEN 4711 AND 4713") == [4712])


@pytest.mark.parametrize("table", ["consumer", "delayed"])
def test_a_duty_that_fails_again_and_again_says_so_once_and_stops_no_other(
    lab: Lab, store: Session, caplog: pytest.LogCaptureFixture, table: str
) -> None:
    # A fault of the state, not of a row: nothing is found by halves.
    lab.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '42501'; END$$"
    )
    if table == "consumer":
        lab.db.execute("CREATE TRIGGER refuse BEFORE DELETE ON consumer FOR EACH ROW EXECUTE FUNCTION refuse()")
        Worker(store, 4711)
        store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp()")
    else:
        lab.db.execute("CREATE TRIGGER refuse BEFORE DELETE ON delayed FOR EACH ROW EXECUTE FUNCTION refuse()")
        lab.enqueue(None, delay=0.1)
    runs = Runs()
    consumer = lab.consumer(runs)
    wait_until(lambda: _said(caplog, "not now"))
    expected = {*enqueue(store, 10)}
    Worker(store, 4712).claim(10)
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp() WHERE id = 4712")
    if table == "consumer":
        expected |= {*lab.enqueue(None, delay=0.1)}
    wait_until(lambda: expected == set(runs.ids))
    _wait_until_quiet(consumer)
    assert len(_said(caplog, "not now")) == 1
    store.sql(f"DROP TRIGGER refuse ON fastq.{table}")
    wait_until(lambda: len(runs.ids) == 11 and lab.value("SELECT count(*) FROM consumer") == 1)


def test_a_leader_whose_duties_take_long_beats_between_them(lab: Lab, store: Session) -> None:
    """Rescue, promotion and retention in a row would take longer than others wait for a heartbeat."""
    for table in ("claim", "delayed", "attempt_error"):
        store.sql(
            f"CREATE FUNCTION fastq.slow_{table}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN PERFORM pg_sleep(2); RETURN NULL; END$$"
        )
        store.sql(
            f"CREATE TRIGGER slow BEFORE DELETE ON fastq.{table} FOR EACH STATEMENT EXECUTE FUNCTION fastq.slow_{table}()"
        )
    lab.db.execute("CREATE TABLE beat (at timestamptz DEFAULT clock_timestamp())")
    lab.db.execute(
        "CREATE FUNCTION note_beat() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS "
        "$$BEGIN INSERT INTO beat DEFAULT VALUES; RETURN NULL; END$$"
    )
    lab.db.execute("CREATE TRIGGER note AFTER INSERT OR UPDATE ON consumer FOR EACH ROW EXECUTE FUNCTION note_beat()")
    lost = enqueue(store, 10)
    Worker(store, 4711).claim(10)
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp()")
    [delayed] = lab.enqueue(None, delay=0.01)
    wait_until(lambda: lab.value("SELECT max(run_at) < clock_timestamp() FROM delayed"))
    lab.db.execute("TRUNCATE beat")
    runs = Runs()
    # A statement may take (7 - 1) / 2 seconds.
    consumer = lab.consumer(runs, heartbeat_interval=1.0, dead_after=7.0, lease=6.0)
    wait_until(lambda: {*runs.ids} == {*lost, delayed}, timeout=40)
    beats = consumer.stats()["beats"]
    wait_until(lambda: consumer.stats()["beats"] >= beats + 2)
    gap = lab.value(
        "SELECT extract(epoch FROM max(gap)) FROM (SELECT at - lag(at) OVER (ORDER BY at) AS gap FROM beat) g"
    )
    # An interval and one slow statement.
    assert 2 <= gap < 5.5
