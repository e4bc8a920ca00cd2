"""Rules of the storage that hold for the schema as a whole."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.databases import Database
from tests.support.storage import Leader, Session, Worker, delay, done_ids, enqueue, states


def relations(store: Session, condition: str) -> list[str]:
    """Names of the schema's relations of which a condition on pg_class holds."""
    rows = store.sql(
        f"SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND {condition}",  # noqa: S608 a constant
        f'"{store.schema}"',
    )
    return sorted(name for (name,) in rows)


def test_no_table_is_unlogged(store: Session) -> None:
    """Empty after a crash or a promotion, unreadable on a standby."""
    assert relations(store, "relpersistence <> 'p'") == []


def test_rule_9_nothing_notifies_but_a_producer_that_says_so(store: Session) -> None:
    """NOTIFY takes a lock on the whole server at commit: never from a trigger."""
    assert relations(store, "relhastriggers") == []
    assert store.sql("SELECT proname FROM pg_proc WHERE pronamespace = $1::regnamespace", f'"{store.schema}"') == []


def test_rule_11_no_foreign_keys(store: Session) -> None:
    assert (
        store.sql(
            "SELECT conname FROM pg_constraint WHERE connamespace = $1::regnamespace AND contype = 'f'",
            f'"{store.schema}"',
        )
        == []
    )


def test_rule_11_no_row_is_updated_as_a_counter_by_enqueue_claim_and_completion(store: Session) -> None:
    """Under a held snapshot one such row went from 113 to 1,260 us. Only a claim and a chunk that are shrunk are updated."""
    enqueue(store, 100)
    worker = Worker(store, 1)
    store.begin()
    enqueue(store, 100)
    for _ in range(4):
        for chunk in worker.claim(30):
            worker.complete({chunk.no: range(chunk.lo, chunk.upto)})
            worker.complete({chunk.no: [chunk.upto]})
    updated = store.sql(
        "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind = 'r' "
        "AND pg_stat_get_xact_tuples_updated(oid) > 0 ORDER BY relname",
        f'"{store.schema}"',
    )
    store.rollback()
    assert updated == [("claim",), ("ready",)]


# --- rule 10 -------------------------------------------------------------------------------------


@pytest.fixture
def humble(database: Database, store: Session) -> Iterator[Session]:
    """A session of a role that owns nothing and may only read and write rows, and truncate."""
    if database.admin_dsn is None:
        pytest.skip("a role is made by a superuser, and the database that was given names none")
    name, password = f"humble_{secrets.token_hex(4)}", secrets.token_hex(16)
    role, schema = sql.Identifier(name), sql.Identifier(store.schema)
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        for text in (
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password),
            sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role),
            sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA {} TO {}").format(
                schema, role
            ),
            sql.SQL("GRANT USAGE ON ALL SEQUENCES IN SCHEMA {} TO {}").format(schema, role),
        ):
            admin.execute(text)
        session = Session(make_conninfo(database.dsn, user=name, password=password), store.schema)
        try:
            yield session
        finally:
            session.close()
            admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


def test_rule_10_rights_on_rows_alone_are_enough(humble: Session) -> None:
    """The whole life of tasks, upkeep and the emptying of leaves among it."""
    ids = enqueue(humble, 20)
    delay(humble, [5_000_001], 0.0)
    leader = Leader(humble)
    assert leader.tick()["term"] == 1
    leader.run("promote_tasks", 10, 0)
    worker = Worker(humble, 1)
    held = worker.claim(10)
    worker.complete({held[0].no: ids[:5]})
    worker.fail(held[0].no, ids[5:7], 0.0)
    worker.fail(held[0].no, ids[7:8])
    worker.give_back({held[0].no: ids[8:9]})
    leader.declare_dead(worker)
    leader.rescue()
    leader.run("forget_consumers")
    assert leader.run("open_leaf", 0.0) == [(1,)]
    while leader.one("move_chunks", 0, 10)[0] or leader.one("carry_delayed", 0, 10)[0]:
        pass
    assert leader.empty_leaf(0)
    leader.run("purge_dead", ["failed"], [None], [0.0], 10)
    leader.run("purge_errors", 0.0, 0, 10)
    leader.run("purge_tokens", 0.0, "", "", 10)
    leader.run("promote_tasks", 10, 1)
    again = Worker(humble, 2)
    while chunks := again.claim():
        for chunk in chunks:
            again.complete({chunk.no: range(chunk.lo, chunk.upto + 1)})
    rest = [id_ for id_ in (*ids, 5_000_001) if id_ not in (*ids[:5], ids[7])]
    assert done_ids(humble) == rest
    assert states(humble) == dict.fromkeys(rest, "completed")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        humble.sql("DROP TABLE fastq.task_00")
