"""What a call in the user's transaction does to that transaction's settings."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from fastq import AsyncClient, Client, InvalidTransition, TaskNotFound
from fastq.errors import DatabaseError
from tests.support.storage import Session, enqueue


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture
def seen(dsn: str, store: Session) -> str:
    """A table of what was set when a cancelled task was stored."""
    with psycopg.connect(dsn, autocommit=True) as owner:
        name = sql.Identifier(store.schema)
        owner.execute(
            sql.SQL("CREATE TABLE {}.seen AS SELECT ''::text AS jit, ''::text AS scan LIMIT 0").format(name),
        )
        owner.execute(
            sql.SQL(
                "CREATE FUNCTION {0}.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO {0}.seen "
                "VALUES (current_setting('jit'), current_setting('enable_seqscan')); RETURN NULL; END $$"
            ).format(name)
        )
        owner.execute(
            sql.SQL("CREATE TRIGGER see AFTER INSERT ON {0}.dead FOR EACH ROW EXECUTE FUNCTION {0}.see()").format(name)
        )
    return store.schema


def _settings(connection: psycopg.Connection) -> object:
    return connection.execute("SELECT current_setting('jit'), current_setting('enable_seqscan')").fetchone()


@pytest.mark.parametrize(("jit", "scan"), [("on", "on"), ("off", "off")])
def test_statements_are_never_compiled_and_settings_come_back(
    client: Client, store: Session, seen: str, dsn: str, jit: str, scan: str
) -> None:
    first, second = enqueue(store, 2)
    with psycopg.connect(dsn, options=f"-c jit={jit} -c enable_seqscan={scan}") as connection:
        assert client.cancel_task_tx(connection, first).state == "cancelled"
        assert _settings(connection) == (jit, scan)
        with pytest.raises(InvalidTransition):
            client.edit_task_tx(connection, first, delay=1)
        with pytest.raises(TaskNotFound):
            client.cancel_task_tx(connection, 2**40)
        assert _settings(connection) == (jit, scan)
        found = connection.execute(sql.SQL("SELECT * FROM {}.seen").format(sql.Identifier(seen))).fetchall()
        assert found == [("off", "off")]
        connection.commit()
        connection.execute("SET LOCAL jit = on")
        client.cancel_task_tx(connection, second)
        assert _settings(connection) == ("on", scan)
        connection.rollback()
        assert _settings(connection) == (jit, scan)


def test_a_refused_statement_leaves_them_to_the_savepoint(client: Client, store: Session, seen: str, dsn: str) -> None:
    (id_,) = enqueue(store, 1)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("ALTER TABLE {}.seen ADD CHECK (jit = 'never')").format(sql.Identifier(seen)))
    with psycopg.connect(dsn, options="-c jit=on") as connection:
        with pytest.raises(DatabaseError, match="check constraint"), connection.transaction():
            client.cancel_task_tx(connection, id_)
        assert _settings(connection) == ("on", "on")
        assert client.get_task(id_).state == "pending"


@pytest.mark.asyncio
async def test_the_async_client_does_alike(store: Session, seen: str, dsn: str) -> None:
    (id_,) = enqueue(store, 1)
    async with (
        AsyncClient(dsn, schema=store.schema) as client,
        await psycopg.AsyncConnection.connect(dsn, options="-c jit=on") as connection,
    ):
        await client.cancel_task_tx(connection, id_)
        answer = await connection.execute("SELECT current_setting('jit'), current_setting('enable_seqscan')")
        assert await answer.fetchone() == ("on", "on")
        answer = await connection.execute(sql.SQL("SELECT * FROM {}.seen").format(sql.Identifier(seen)))
        assert await answer.fetchall() == [("off", "off")]
