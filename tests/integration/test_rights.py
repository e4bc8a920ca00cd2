"""Roles that own nothing: what a worker's, a producer's and a viewer's rights are enough for, and what they are not."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fastq import Client, Producer, Task, TaskInfo, _engine
from fastq._db import Database as Db
from fastq.errors import DatabaseError, SettingsError
from fastq.migrations import down, migrate
from fastq.rights import KINDS, Kind, checking, grants, held
from tests.support.consuming import new_consumer
from tests.support.databases import Database
from tests.support.lab import Lab
from tests.support.puppets import Puppet
from tests.support.roles import Roles, database_with_admin
from tests.support.storage import Session, Worker, enqueue
from tests.support.waiting import wait_until

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Database]:
    """A database in which roles can be made."""
    with database_with_admin(database) as found:
        yield found


@pytest.fixture(scope="module")
def dsn(server: Database) -> str:
    """Of the owner of all schemas here, for the fixtures that make them."""
    return server.dsn


@pytest.fixture
def roles(server: Database, migrated: str) -> Iterator[Roles]:
    with Roles(server, migrated) as made:
        yield made


def refusal(error: pytest.ExceptionInfo[DatabaseError]) -> str:
    """The message of a right that is missing."""
    assert error.value.sqlstate == "42501"
    return str(error.value)


# --- a handler -----------------------------------------------------------------------------------


def test_a_handlers_role_completes_its_tasks_and_does_nothing_else(
    roles: Roles, migrated: str, db: psycopg.Connection
) -> None:
    _, worker_dsn = roles.new("worker")
    _, handler_dsn = roles.new("handler")
    puppet = Puppet(new_consumer(worker_dsn, migrated))
    puppet.consumer.start()
    try:
        with Producer(worker_dsn, schema=migrated) as producer:
            producer.enqueue(Task("t"))
        run = puppet.next()
        with psycopg.connect(handler_dsn) as conn:
            run.do(lambda: run.task.complete_tx(conn))
            with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
                conn.execute(sql.SQL("SELECT payload FROM {}.task").format(sql.Identifier(migrated)))
        run.end()
        wait_until(lambda: puppet.consumer.stats()["completed"] == 1)
    finally:
        puppet.stop()


@pytest.mark.parametrize("kind", [None, "viewer", "producer"])
def test_a_role_that_may_complete_nothing_is_told_what_it_needs(roles: Roles, migrated: str, kind: Kind | None) -> None:
    _, dsn = roles.add() if kind is None else roles.new(kind)
    _, worker_dsn = roles.new("worker")
    puppet = Puppet(new_consumer(worker_dsn, migrated))
    puppet.consumer.start()
    try:
        with Producer(worker_dsn, schema=migrated) as producer:
            producer.enqueue(Task("t"))
        run = puppet.next()
        with psycopg.connect(dsn) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            run.do(lambda: run.task.complete_tx(conn))
        assert "`fastq migrate --grants --handler NAME` prints" in caught.value.__notes__[0]
    finally:
        puppet.stop()


# --- a worker ------------------------------------------------------------------------------------


def test_a_worker_lives_the_whole_life_of_tasks(
    roles: Roles, migrated: str, db: psycopg.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Enqueued in every way, claimed, completed, failed, retried, delayed, lost and rescued, and forgotten with their leaves."""
    _, dsn = roles.new("worker")

    def handle(task: TaskInfo) -> None:
        if task.payload == "fail" or (task.payload == "fail once" and task.attempt == 1):
            raise ValueError(task.payload)

    with caplog.at_level(logging.DEBUG, "fastq"), Lab(dsn, migrated, db, tmp_path) as lab:
        gate, doomed = lab.gate(), lab.worker()
        lost = lab.enqueue(gate.orders, gate.orders)
        wait_until(lambda: sorted(lab.journal.started()) == lost)
        lab.wait_for_beat(lab.consumer_id(pid=doomed.pid), running=lost)
        doomed.kill()
        gate.open()
        lab.producer.enqueue(Task("t"))
        lab.producer.enqueue(Task("t", delay=0.2, idempotency_token="single"))
        lab.enqueue("fail once", "fail", count=None, max_attempts=2)
        lab.enqueue(count=1000)
        again = [Task("t", idempotency_token=str(n % 10)) for n in range(20)]
        assert [result.is_new for result in lab.producer.enqueue_many(again)] == [True] * 10 + [False] * 10
        worker = lab.consumer(handle)
        lab.wait_for(completed=2 + 2 + 1 + 1000 + 10, failed=1)
        assert set(lab.losses()) == set(lost)
        worker.stop()
        lab.consumer(handle, completed_retention=1.0, failed_retention=1.0, archive=True)
        wait_until(
            lambda: lab.all("SELECT id FROM task UNION SELECT id FROM dead UNION SELECT lo FROM done") == [], timeout=30
        )
        assert lab.value("SELECT count(*) FROM archive") == 1016
    assert not [record for record in caplog.records if "permission" in record.getMessage()]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE fastq.mine (n integer)",
        "ALTER TABLE fastq.ready ADD COLUMN mine integer",
        "CREATE INDEX ON fastq.ready (leaf)",
        "DROP TABLE fastq.task_00",
        "DROP VIEW fastq.tasks",
        "ALTER SEQUENCE fastq.task_id RESTART",
        "DELETE FROM fastq.task_00",
        "DELETE FROM fastq.lane",
        "UPDATE fastq.attempt_error SET error = ''",
        "TRUNCATE fastq.ready",
        "DELETE FROM fastq.migration",
    ],
)
def test_a_worker_changes_no_table(roles: Roles, migrated: str, statement: str) -> None:
    _, dsn = roles.new("worker")
    session = Session(dsn, migrated)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.sql(statement)
    session.close()


def test_a_worker_does_not_migrate_and_is_told_who_does(roles: Roles, dsn: str, migrated: str) -> None:
    name, worker_dsn = roles.new("worker")
    assert migrate(worker_dsn, schema=migrated) == [], "where nothing is missing, nothing is refused"
    with pytest.raises(DatabaseError, match="must be owner of") as error:
        down(worker_dsn, schema=migrated, yes=True)
    owner = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
    assert f"role {name!r} may not migrate schema {migrated!r}" in refusal(error)
    assert f"migrate as its owner, {owner!r}" in refusal(error)
    down(dsn, schema=migrated, yes=True)
    with pytest.raises(DatabaseError) as error:
        migrate(worker_dsn, schema=migrated)
    assert f"role {name!r} may not migrate" in refusal(error)


def test_a_schema_that_is_not_there_is_made_by_one_who_may(roles: Roles, migrated: str) -> None:
    name, worker_dsn = roles.new("worker")
    with pytest.raises(DatabaseError) as error:
        migrate(worker_dsn, schema=f"{migrated}_not_there")
    assert f"create the schema with AUTHORIZATION {name}" in refusal(error)


def test_a_client_with_a_workers_rights_changes_tasks(roles: Roles, migrated: str, store: Session) -> None:
    _, dsn = roles.new("worker")
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    [chunk] = worker.claim(4)
    worker.complete({chunk.no: ids[:2]})
    worker.fail(chunk.no, ids[2:3])
    store.run("insert_tokens", ["t"], ["a"], [ids[0]])
    with Client(dsn, schema=migrated) as client:
        assert client.cancel_task(ids[3]).state == "cancelled"
        assert client.retry_task(ids[2]).state == "pending"
        assert client.edit_task(ids[2], payload=1, delay=5).payload == 1
        assert client.edit_task(ids[4], payload=1).payload == 1
        assert client.edit_task(ids[5], delay=60).kind == "scheduled"
        for id_ in (ids[0], ids[2], ids[3], ids[4]):
            client.delete_task(id_)
        assert client.cancel_tasks(types=["t"]) == 5
        assert client.counts(states=["cancelled", "completed", "pending"]) == {
            "cancelled": 5,
            "completed": 1,
            "pending": 0,
        }


# --- a producer ----------------------------------------------------------------------------------


def test_a_producer_enqueues_in_its_own_transaction(roles: Roles, migrated: str, db: psycopg.Connection) -> None:
    _, dsn = roles.new("producer")
    tasks = [Task("t", idempotency_token=str(n % 900), delay=60 if n % 3 else None) for n in range(1_000)]
    with Producer(dsn, schema=migrated) as producer, psycopg.connect(dsn) as connection:
        producer.enqueue_tx(connection, Task("t", idempotency_token="5"), notify=True)
        answers = producer.enqueue_many_tx(connection, tasks, notify=True)
        connection.commit()
    assert [answer.is_new for answer in answers].count(False) == 101
    assert db.execute("SELECT count(*) FROM token").fetchone() == (900,)


def test_a_producer_enqueues_in_every_way(roles: Roles, migrated: str, db: psycopg.Connection) -> None:
    _, dsn = roles.new("producer")
    with Producer(dsn, schema=migrated) as producer:
        first = producer.enqueue(Task("new type", {"n": 1}, queue="new queue"))
        assert first.is_new
        producer.enqueue(Task("t", delay=60))
        token = [producer.enqueue(Task("t", idempotency_token="a")) for _ in range(2)]
        assert (token[0].id, token[0].is_new, token[1].is_new) == (token[1].id, True, False)
        producer.enqueue_many(Task("t") for _ in range(2000))
        producer.enqueue_many((Task("t") for _ in range(2000)), commit_every=500)
        results = producer.enqueue_many(Task("t", idempotency_token=str(n // 2), delay=n % 2) for n in range(100))
        assert [result.is_new for result in results] == [True, False] * 50
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (1 + 1 + 1 + 4000 + 50,)
    session = Session(dsn, migrated)
    found = session.run("find_enqueued", [first.id])
    assert [(id_, payload) for id_, _, payload in found] == [(first.id, b'{"n":1}')], (
        "how a commit in doubt is looked up"
    )
    session.close()


def test_a_producer_takes_tokens_over_and_replaces_nothing(roles: Roles, migrated: str, db: psycopg.Connection) -> None:
    _, dsn = roles.new("producer")
    lent = [Task("t", idempotency_token="a", token_until="ended"), Task("t", idempotency_token="b", token_ttl=60)]
    with Producer(dsn, schema=migrated) as producer, psycopg.connect(dsn) as connection:
        first = producer.enqueue_many(lent)
        db.execute("DELETE FROM ready")
        db.execute("UPDATE token SET expires_at = clock_timestamp() WHERE expires_at IS NOT NULL")
        assert [result.is_new for result in producer.enqueue_many(lent)] == [True, True]
        db.execute("DELETE FROM ready")
        assert producer.enqueue_tx(connection, lent[0]).id > first[0].id
        connection.commit()
        with pytest.raises(DatabaseError, match="permission denied"):
            producer.enqueue(Task("t", idempotency_token="a", on_conflict="replace"))


def test_a_producer_reads_of_a_task_what_a_commit_in_doubt_needs(roles: Roles, migrated: str) -> None:
    """As the documents say: id, lane and payload of what waits, runs or completed; tokens; nothing of attempts, failures, consumers."""
    _, dsn = roles.new("producer")
    session = Session(dsn, migrated)
    for columns in (
        "task (id, lane, payload)",
        "delayed (id, lane, payload)",
        "token (type, token, id)",
        "ready (lo, hi)",
        "claim (ids)",
    ):
        table, _, names = columns.partition(" ")
        session.sql(f"SELECT {names.strip('()')} FROM fastq.{table}")  # noqa: S608 constants
    for text in (
        "SELECT created_at FROM fastq.task",
        "SELECT run_at FROM fastq.delayed",
        *(
            f"SELECT FROM fastq.{table}"
            for table in ("done", "dead", "attempt_error", "consumer", "leader", "tasks", "task_00")
        ),
        "SELECT attempts FROM fastq.ready",
        "SELECT consumer FROM fastq.claim",
        "UPDATE fastq.token SET token = 'x'",
        "UPDATE fastq.task SET lane = 0",
        "DELETE FROM fastq.token",
        "DELETE FROM fastq.delayed",
        "TRUNCATE fastq.task_00",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.sql(text)
    session.close()


def test_a_producer_does_not_work_and_is_told_what_is_missing(roles: Roles, migrated: str) -> None:
    name, dsn = roles.new("producer")
    consumer = new_consumer(dsn, migrated)
    consumer.handler("t")(lambda _: None)
    with pytest.raises(DatabaseError) as error:
        consumer.start()
    message = refusal(error)
    assert f"role {name!r} may not work in schema {migrated!r}".replace("'", '"') in message
    for right in (
        "SELECT, INSERT, UPDATE, DELETE on claim",
        "TRUNCATE on task_00 and 15 more leaves",
        "UPDATE on leaf",
    ):
        assert right in message
    assert f"fastq migrate --grants --worker {name}" in message


def test_a_producer_does_not_look_and_is_told_what_is_missing(roles: Roles, migrated: str) -> None:
    name, dsn = roles.new("producer")
    with Client(dsn, schema=migrated) as client, pytest.raises(DatabaseError) as error:
        client.counts()
    assert f"role {name!r} may not look in schema {migrated!r}: it lacks SELECT on" in refusal(error)


# --- a viewer ------------------------------------------------------------------------------------


def test_a_viewer_sees_all(roles: Roles, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with Producer(dsn, schema=migrated) as producer:
        ids = [result.id for result in producer.enqueue_many([Task("t", n) for n in range(3)] + [Task("t", delay=60)])]
    _, viewer_dsn = roles.new("viewer")
    with Client(viewer_dsn, schema=migrated) as client:
        assert client.counts(states=["pending", "scheduled"]) == {"pending": 4, "scheduled": 1}
        assert client.get_task(ids[1]).payload == 1
        assert {task.id for task in client.list_tasks()} == set(ids)
        assert {task.id for task in client.list_tasks(order_by="id", types=["t"])} == set(ids)
    session = Session(viewer_dsn, migrated)
    assert session.value("SELECT count(*) FROM fastq.tasks") == 4
    session.close()


def test_a_viewers_client_is_told_what_is_missing_to_change_tasks(
    roles: Roles, migrated: str, store: Session, dsn: str
) -> None:
    name, viewer_dsn = roles.new("viewer")
    [id_] = enqueue(store)
    with Client(viewer_dsn, schema=migrated) as client:
        for call in (lambda: client.cancel_task(id_), lambda: client.delete_tasks(ids=[id_])):
            with pytest.raises(DatabaseError) as error:
                call()
            message = refusal(error)
            assert f"role {name!r} may not work in schema {migrated!r}: it lacks" in message
            assert "UPDATE, DELETE on ready" in message
            assert f"fastq migrate --grants --worker {name}" in message
        assert client.count_tasks("cancel", ids=[id_]) == 1, "a preview is a look"
        with (
            psycopg.connect(viewer_dsn) as connection,
            pytest.raises(DatabaseError, match="permission denied") as error,
        ):
            client.cancel_task_tx(connection, id_)
        assert error.value.sqlstate == "42501"
        assert client.get_task(id_).state == "pending"


def test_a_viewer_changes_nothing(roles: Roles, migrated: str) -> None:
    _, dsn = roles.new("viewer")
    session = Session(dsn, migrated)
    tables = session.sql(
        "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind IN ('r', 'p')", f'"{migrated}"'
    )
    assert len(tables) > 40
    for (table,) in tables:
        for text in ("DELETE FROM {}", "TRUNCATE {}", "INSERT INTO {} DEFAULT VALUES"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.connection.execute(sql.SQL(text).format(sql.Identifier(migrated, table)))
    for sequence in ("task_id", "rid"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.sql("SELECT nextval($1::regclass)", f'"{migrated}".{sequence}')
    session.close()


def test_a_viewer_is_told_what_is_missing_to_enqueue_and_to_work(roles: Roles, migrated: str) -> None:
    name, dsn = roles.new("viewer")
    with Producer(dsn, schema=migrated) as producer:
        for call in (lambda: producer.enqueue(Task("t")), lambda: producer.enqueue_many([Task("t")])):
            with pytest.raises(DatabaseError) as error:
                call()
            message = refusal(error)
            assert f'role "{name}" may not enqueue in schema "{migrated}": it lacks USAGE on task_id' in message
            assert f"fastq migrate --grants --producer {name}" in message
    consumer = new_consumer(dsn, migrated)
    consumer.handler("t")(lambda _: None)
    with pytest.raises(DatabaseError) as error:
        consumer.start()
    assert "may not work" in refusal(error)


def test_without_any_right_the_schema_itself_is_named(roles: Roles, migrated: str) -> None:
    name, dsn = roles.add()
    with Producer(dsn, schema=migrated) as producer, pytest.raises(DatabaseError) as error:
        producer.enqueue(Task("t"))
    assert f"it lacks USAGE on schema {migrated}" in refusal(error)
    with Client(dsn, schema=migrated) as client, pytest.raises(DatabaseError) as error:
        client.counts()
    assert f"role {name!r} may not look in schema {migrated!r}: it lacks USAGE on schema {migrated}" in refusal(error)


# --- what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_right_that_is_taken_away_is_named(roles: Roles, migrated: str, kind: Kind) -> None:
    name, dsn = roles.new(kind)
    rights = _engine.rights_of(kind)
    assert len(rights) == len(set(rights)) >= 10
    with Db(dsn, migrated) as db:
        db.perform(checking(db.schema, kind))
        for on, object_, privilege, column in rights:
            what = f"{privilege} ({column})" if column else privilege
            where = f'SCHEMA "{migrated}"' if on == "schema" else f'{on} "{migrated}".{object_}'
            roles.as_owner(f'REVOKE {what} ON {where} FROM "{name}"')
            with pytest.raises(DatabaseError) as error:
                db.perform(checking(db.schema, kind))
            lacking = f"{what} on {object_ or f'schema {migrated}'}"
            assert f"it lacks {lacking}. The schema's owner" in refusal(error)
            assert held(db).lacking[kind] == lacking
            roles.as_owner(f'GRANT {what} ON {where} TO "{name}"')
        db.perform(checking(db.schema, kind))


def test_granting_again_changes_nothing(roles: Roles, migrated: str, db: psycopg.Connection) -> None:
    name, _ = roles.new("worker")
    query = "SELECT relname, relacl::text FROM pg_class WHERE relnamespace = %s::regnamespace ORDER BY relname"
    before = db.execute(query, [migrated]).fetchall()
    roles.grant(name, "worker")
    assert db.execute(query, [migrated]).fetchall() == before


def test_names_that_have_to_be_quoted(server: Database, dsn: str, db: psycopg.Connection) -> None:
    schema = f"Tasks of {secrets.token_hex(4)} TO fastq_worker; fastq.x"
    name = f'We"ird {secrets.token_hex(4)} fastq.lane TO fastq_worker;'
    try:
        migrate(dsn, schema=schema)
        with Roles(server, schema) as roles:
            _, worker_dsn = roles.add(name)
            roles.grant(name, "worker")
            with Producer(worker_dsn, schema=schema) as producer:
                assert producer.enqueue(Task("t")).is_new
    finally:
        db.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


@pytest.mark.parametrize("name", ["", "public", "none", "x" * 64, "a\0b", "a\nb"])
def test_names_that_no_role_can_have(name: str) -> None:
    with pytest.raises(SettingsError, match="must be a role's name"):
        grants(producer=name)


def test_a_schema_name_that_postgresql_would_refuse() -> None:
    with pytest.raises(SettingsError, match="schema"):
        grants(schema='x"y')


def test_only_the_kinds_asked_for_are_printed() -> None:
    text = grants(viewer="me", schema="s")
    assert set(re.findall(r'TO (".*");$', text, re.MULTILINE)) == {'"me"'}
    assert "INSERT" not in text
    assert '"s".task' in text


def test_the_documents_show_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_SCHEMA", raising=False)
    blocks = re.findall(r"^```sql\n(.*?)^```$", (_ROOT / "docs/operations.md").read_text(), re.MULTILINE | re.DOTALL)
    assert grants() in blocks
