"""What is the async client's own: the caller's transaction, cancelled calls, event loops. The rest is tested with `Client`'s."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from typing import Any

import psycopg
import pytest

from fastq import AsyncClient, Client, ConnectionLost, DatabaseError, InvalidTransition, TaskNotFound
from fastq.errors import SettingsError
from tests.support.storage import Session, enqueue
from tests.support.waiting import wait_until_async


def name_of(store: Session) -> str:
    return f"client of {store.schema}"


def new_client(dsn: str, store: Session, **options: Any) -> AsyncClient:
    named = psycopg.conninfo.make_conninfo(dsn, application_name=name_of(store))
    return AsyncClient(named, schema=store.schema, **options)


def sessions(store: Session, wait: str = "%") -> int:
    return int(
        store.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND coalesce(wait_event_type, '') LIKE $2",
            name_of(store),
            wait,
        )
    )


def test_it_has_all_that_the_client_has() -> None:
    def surface(kind: type[Any]) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(found)
            for name, found in vars(kind).items()
            if not name.startswith("_") and callable(found)
        }

    def plain(signature: inspect.Signature) -> str:
        return str(signature).replace("AsyncUserConnection", "UserConnection")

    ours, theirs = surface(AsyncClient), surface(Client)
    assert list(ours) == list(theirs)
    assert {name: plain(one) for name, one in ours.items()} == {name: plain(one) for name, one in theirs.items()}
    assert all(inspect.iscoroutinefunction(getattr(AsyncClient, name)) for name in ours)


@pytest.mark.asyncio
async def test_all_of_it_is_the_users_transaction(dsn: str, store: Session) -> None:
    id_ = enqueue(store, 3)[1]
    async with AsyncClient(dsn, schema=store.schema) as client:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            with pytest.raises(SettingsError, match=r"autocommit and in no transaction.*`async with"):
                await client.cancel_task_tx(connection, id_)
            await connection.execute("BEGIN")
            assert (await client.edit_task_tx(connection, id_, payload="new")).payload == "new"
            assert (await client.cancel_task_tx(connection, id_)).state == "cancelled"
            again = await client.retry_task_tx(connection, id_)
            assert (again.state, again.payload) == ("pending", "new")
            await client.delete_task_tx(connection, id_)
            with pytest.raises(TaskNotFound):
                await client.cancel_task_tx(connection, id_)
            await connection.rollback()
            assert (await client.get_task(id_)).payload == {"n": 1}
            connection.row_factory = psycopg.rows.dict_row  # type: ignore[assignment]
            async with connection.transaction():
                assert (await client.cancel_task_tx(connection, id_)).state == "cancelled"
                with pytest.raises(InvalidTransition):
                    await client.edit_task_tx(connection, id_, delay=1)
            assert (await client.get_task(id_)).state == "cancelled"
        with psycopg.connect(dsn) as wrong, pytest.raises(TypeError, match="AsyncConnection is wanted, not Connection"):
            await client.cancel_task_tx(wrong, id_)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_coroutines_take_turns_and_the_loop_goes_on(dsn: str, store: Session) -> None:
    ids = list(enqueue(store, 20))
    async with new_client(dsn, store) as client:
        records = await asyncio.gather(*(client.get_task(id_) for id_ in ids))
        assert [record.id for record in records] == ids
        assert sessions(store) == 1
        store.begin()
        store.sql("LOCK TABLE fastq.dead IN ACCESS EXCLUSIVE MODE")
        counting = asyncio.create_task(client.counts())
        # The loop is free meanwhile.
        await wait_until_async(lambda: sessions(store, "Lock") == 1)
        assert not counting.done()
        store.rollback()
        assert (await counting)["pending"] == 20


@pytest.mark.asyncio
async def test_a_cancelled_call_is_cancelled_on_the_server_and_leaves_a_client_that_works(
    dsn: str, store: Session
) -> None:
    id_ = enqueue(store, 1)[0]
    async with new_client(dsn, store) as client:
        await client.counts()
        store.begin()
        store.sql("LOCK TABLE fastq.dead IN ACCESS EXCLUSIVE MODE")
        cancelling = asyncio.create_task(client.cancel_task(id_))
        waiting = asyncio.create_task(client.get_task(id_))
        await wait_until_async(lambda: sessions(store, "Lock") == 1)
        cancelling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelling
        store.rollback()
        assert (await waiting).state == "pending", "the next in turn goes on, and nothing was done"
        await wait_until_async(lambda: sessions(store) == 1, message="the session of the cancelled call is gone")


@pytest.mark.asyncio
async def test_an_answer_that_does_not_come_in_time(dsn: str, store: Session) -> None:
    async with new_client(dsn, store, statement_timeout=2) as client:
        await client.counts()
        store.begin()
        store.sql("LOCK TABLE fastq.dead IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no answer from .* within 2 s"):
            await client.counts()
        assert time.monotonic() - began < 10
        store.rollback()
        assert (await client.counts())["pending"] == 0


@pytest.mark.asyncio
async def test_a_lost_connection_is_made_again(dsn: str, store: Session) -> None:
    async with new_client(dsn, store) as client:
        await client.counts()
        store.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name_of(store))
        await wait_until_async(lambda: sessions(store) == 0)
        assert (await client.counts())["pending"] == 0
        await client.close()
        await client.close()
        assert (await client.counts())["pending"] == 0


def test_one_loop_after_the_other(dsn: str, store: Session) -> None:
    client = new_client(dsn, store)
    for _ in range(2):
        assert asyncio.run(client.counts())["pending"] == 0

    async def meanwhile() -> None:
        await client.counts()
        with pytest.raises(SettingsError, match="in use on another event loop"):
            await asyncio.to_thread(asyncio.run, client.counts())
        await client.close()

    asyncio.run(meanwhile())


def test_a_forked_child_makes_a_connection_of_its_own(dsn: str, store: Session) -> None:
    client = new_client(dsn, store)
    asyncio.run(client.counts())
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if asyncio.run(client.counts())["pending"] == 0 else 2
            asyncio.run(client.close())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(client.close())


@pytest.mark.asyncio
async def test_a_database_that_is_not_there(dsn: str) -> None:
    missing = psycopg.conninfo.make_conninfo(dsn, dbname="no_such_database")
    async with AsyncClient(missing) as client:
        with pytest.raises(DatabaseError, match="no_such_database") as caught:
            await client.counts()
        assert caught.value.is_transient is False


@pytest.mark.asyncio
async def test_hosts_are_tried_in_turn(store: Session, dsn: str) -> None:
    words = psycopg.conninfo.conninfo_to_dict(dsn)
    hosts, ports = f"127.0.0.1,{words.get('host', '')}", f"1,{words.get('port', 5432)}"
    async with AsyncClient(psycopg.conninfo.make_conninfo(dsn, host=hosts, port=ports), schema=store.schema) as client:
        assert (await client.counts())["pending"] == 0
    async with AsyncClient("host=127.0.0.1,127.0.0.1 port=1,1 connect_timeout=2") as client:
        with pytest.raises(DatabaseError, match=r"127\.0\.0\.1:1: .*; 127\.0\.0\.1:1: ") as caught:
            await client.counts()
        assert caught.value.is_transient
