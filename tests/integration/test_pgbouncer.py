"""Through PgBouncer in transaction mode, where a session is ours for one transaction and never again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from fastq import Client, Producer, Snooze, Task, TaskInfo
from fastq.cli import main
from fastq.migrations import migrate, status
from tests.support.consuming import new_consumer, states, wait_for_states
from tests.support.pgbouncer import PROGRAM, PgBouncer
from tests.support.puppets import Puppet
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer here: apt-get install pgbouncer")


@pytest.fixture(scope="module")
def bouncer(dsn: str) -> Iterator[PgBouncer]:
    """Fewer sessions than a worker and a producer have connections: none may be kept."""
    with PgBouncer(dsn, pool_size=2) as running:
        yield running


@pytest.fixture
def pooled(bouncer: PgBouncer, schema: str) -> str:
    """The way through it; the test's schema is migrated, through it too."""
    migrate(bouncer.dsn, schema=schema)
    return bouncer.dsn


@pytest.fixture
def producer(pooled: str, schema: str) -> Iterator[Producer]:
    with Producer(pooled, schema=schema) as made:
        yield made


def sessions_in_turn(bouncer: PgBouncer, statement: str) -> list[Any]:
    """What each of the server's sessions answers: a transaction on each of them at once."""
    users = [psycopg.connect(bouncer.dsn) for _ in range(bouncer.pool_size)]
    try:
        answers = [user.execute(statement.encode()).fetchall() for user in users]
    finally:
        for user in users:
            user.close()
    return answers


def wait_until_nobody_holds_a_session(bouncer: PgBouncer) -> None:
    wait_until(lambda: bouncer.sessions("active") == 0, message="all sessions of the server to be given back")


def test_migrations_doctor_and_client(pooled: str, schema: str, producer: Producer) -> None:
    assert status(pooled, schema=schema).version == status(pooled, schema=schema).latest
    result = CliRunner().invoke(main, ["doctor", "--dsn", pooled, "--schema", schema])
    assert result.exit_code == 0, result.output
    task = producer.enqueue(Task("t", {"n": 1}))
    with Client(pooled, schema=schema) as client:
        for _ in range(10):
            assert client.get_task(task.id).payload == {"n": 1}
        client.cancel_task(task.id)
        assert client.get_task(task.id).state == "cancelled"


def test_every_way_to_enqueue(
    bouncer: PgBouncer, pooled: str, schema: str, producer: Producer, db: psycopg.Connection
) -> None:
    many = producer.enqueue_many(Task("t", {"n": n}) for n in range(5_000))
    assert len({one.id for one in many}) == 5_000
    cut = producer.enqueue_many(
        (Task("t", n, delay=600 if n % 7 == 0 else None) for n in range(1_000)), commit_every=300
    )
    assert len({one.id for one in cut}) == 1_000
    # What first expires comes when the transaction has long been open.
    soon = datetime.now(UTC) + timedelta(hours=1)
    expiring = producer.enqueue_many(Task("t", n, expires_at=soon if n >= 30_000 else None) for n in range(30_010))
    assert len({one.id for one in expiring}) == 30_010
    assert producer.enqueue(Task("t", expires_at=soon)).is_new
    with ThreadPoolExecutor(8) as threads:
        single = list(threads.map(lambda n: producer.enqueue(Task("t", n)), range(400)))
    assert len({one.id for one in single}) == 400
    first = producer.enqueue(Task("t", idempotency_token="a"))
    again = producer.enqueue(Task("t", idempotency_token="a"))
    assert (first.is_new, again.is_new, again.id) == (True, False, first.id)
    mixed = producer.enqueue_many(Task("t", n, idempotency_token="abc"[n % 3]) for n in range(6))
    assert [one.is_new for one in mixed] == [False, True, True, False, False, False]
    later = producer.enqueue(Task("t", delay=600))
    assert later.is_new
    with psycopg.connect(pooled, prepare_threshold=None) as user:
        producer.enqueue_tx(user, Task("t"))
        producer.enqueue_many_tx(user, [Task("t", n) for n in range(1_000)])
    assert sum(states(db).values()) == 5_000 + 1_000 + 30_010 + 1 + 400 + 1 + 2 + 1 + 1 + 1_000
    assert db.execute("SELECT count(*) FROM task WHERE expires_at IS NOT NULL").fetchone() == (11,)
    wait_until_nobody_holds_a_session(bouncer)


def test_work_and_what_is_left_in_the_sessions(
    bouncer: PgBouncer,
    pooled: str,
    schema: str,
    producer: Producer,
    db: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fastq")
    consumer = new_consumer(pooled, schema, completed_retention=0.5)
    snoozed: set[int] = set()

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        if task.payload == "fails" and task.attempt == 1:
            raise ValueError("as ordered")
        if task.payload == "fails for good":
            raise ValueError("as ordered")
        if task.payload == "snoozes" and task.id not in snoozed:
            snoozed.add(task.id)
            raise Snooze(0)

    payloads = ["fails", "fails for good", "snoozes", *range(3_000)]
    producer.enqueue_many(Task("t", payload, max_attempts=2) for payload in payloads)
    with consumer:
        # The retention empties whole leaves meanwhile: what is left of them is not to be seen.
        wait_until(
            lambda: states(db).get("failed") == 1 and not states(db).keys() - {"failed", "completed"}, timeout=30
        )
        wait_until(lambda: states(db) == {"failed": 1}, timeout=30, message="the leaves to be emptied")
        late = producer.enqueue(Task("t"))
        wait_until(lambda: consumer.stats()["completed"] == 3_003, message=f"task {late.id} to be run")
    assert "through a pooler" in caplog.text
    ours = [record for record in caplog.records if record.name != "fastq.handler"]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    wait_until_nobody_holds_a_session(bouncer)
    assert sessions_in_turn(bouncer, "SELECT name FROM pg_prepared_statements") == [[], []]
    assert sessions_in_turn(bouncer, "SELECT * FROM pg_listening_channels()") == [[], []]
    left = (
        "SELECT name FROM pg_settings WHERE source = 'session' AND name NOT IN "
        "('application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings')"
    )
    assert sessions_in_turn(bouncer, left) == [[], []]


def test_statements_are_told_how_to_plan_and_commit(pooled: str, schema: str, dsn: str) -> None:
    """As a session of our own is: what the server sees of a claim, by a function that the claim calls."""
    with psycopg.connect(dsn, autocommit=True) as owner:
        name = sql.Identifier(schema)
        owner.execute(
            sql.SQL(
                "CREATE TABLE {0}.seen AS SELECT current_setting('enable_seqscan') AS scan, "
                "current_setting('synchronous_commit') AS commit, ''::text AS who LIMIT 0"
            ).format(name)
        )
        owner.execute(
            sql.SQL(
                "CREATE FUNCTION {0}.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO {0}.seen VALUES (current_setting('enable_seqscan'), current_setting('synchronous_commit'), TG_ARGV[0]); "
                "RETURN NULL; END $$"
            ).format(name)
        )
        for table, who in (("ready", "producer"), ("claim", "worker")):
            owner.execute(
                sql.SQL("CREATE TRIGGER see AFTER INSERT ON {0}.{1} FOR EACH ROW EXECUTE FUNCTION {0}.see({2})").format(
                    name, sql.Identifier(table), who
                )
            )
        with Producer(pooled, schema=schema, notify=False) as producer:
            producer.enqueue(Task("t"))
            producer.enqueue_many(Task("t", n) for n in range(10))
        consumer = new_consumer(pooled, schema)
        done = []
        consumer.handler("t")(lambda task: done.append(task.id))
        with consumer:
            wait_until(lambda: len(done) == 11)
        rows = owner.execute(
            sql.SQL("SELECT DISTINCT who, scan, commit FROM {}.seen ORDER BY 1").format(sql.Identifier(schema))
        )
        assert rows.fetchall() == [("producer", "off", "on"), ("worker", "off", "off")]


def test_names_that_others_left_in_the_sessions(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    """The driver of the COPY names its statements s0, s1, …: so do those of others.

    Through a pooler of the test's own, with one session: the names are surely where the COPY comes, and with no other test.
    """
    with PgBouncer(dsn, pool_size=1) as own:
        with psycopg.connect(own.dsn, autocommit=True) as careless:
            for n in range(200):
                careless.execute(f"PREPARE s{n} AS SELECT 1".encode())
        with Producer(own.dsn, schema=migrated) as producer:
            for _ in range(3):
                producer.enqueue_many(Task("t", n) for n in range(100))
        assert states(db) == {"pending": 300}


def test_the_pooler_goes_away_and_comes_back(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with PgBouncer(dsn) as own, Producer(own.dsn, schema=migrated) as producer:
        consumer = new_consumer(own.dsn, migrated)
        consumer.handler("t")(lambda _: None)
        with consumer:
            producer.enqueue(Task("t"))
            wait_for_states(db, {"completed": 1})
            own.kill()
            own.start()
            for n in range(20):
                producer.enqueue(Task("t", n))
            wait_for_states(db, {"completed": 21})


@pytest.mark.parametrize("is_pooled", [False, True], ids=["server", "pooler"])
def test_a_pooler_is_known_by_its_answer_to_the_login(
    dsn: str, pooled: str, schema: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture, is_pooled: bool
) -> None:
    caplog.set_level(logging.INFO, "fastq")
    consumer = new_consumer(pooled if is_pooled else dsn, schema)
    consumer.handler("t")(lambda _: None)
    with Producer(dsn, schema=schema) as producer, consumer:
        producer.enqueue(Task("t"))
        wait_for_states(db, {"completed": 1})
    assert ("connected through a pooler" in caplog.text) == is_pooled


def test_a_task_is_completed_in_its_handlers_transaction(
    pooled: str, schema: str, producer: Producer, db: psycopg.Connection
) -> None:
    """The worker's session and the user's change with each transaction; what they agree on lies in the tables."""
    consumer = new_consumer(pooled, schema, concurrency=4, poll_interval=0.1)
    puppet = Puppet(consumer)
    producer.enqueue_many(Task("t", n) for n in range(4))
    consumer.start()
    try:
        runs = [puppet.next() for _ in range(4)]
        with psycopg.connect(pooled, prepare_threshold=None) as conn:
            runs[0].do(lambda: runs[0].task.complete_tx(conn))
            for run in runs[1:]:
                run.end()
            wait_for_states(db, {"completed": 3, "running": 1})
        runs[0].end()
        wait_for_states(db, {"completed": 4})
        wait_until(lambda: consumer.stats()["completed"] == 4)
        assert consumer.stats()["refused"] == 0
        again = producer.enqueue(Task("t"))
        run = puppet.next()
        with psycopg.connect(pooled, prepare_threshold=None) as conn:
            run.do(lambda: run.task.complete_tx(conn))
            conn.rollback()
        run.end()
        second = puppet.next()
        assert (second.task.id, second.task.attempt) == (again.id, 2)
    finally:
        puppet.stop()
