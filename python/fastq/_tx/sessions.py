"""Finds what a connection is, by its class, without importing its package."""

from __future__ import annotations

from typing import Any

from fastq._tx import on_sqlalchemy
from fastq._tx.on_asyncpg import AsyncpgSession
from fastq._tx.on_django import DjangoSession
from fastq._tx.on_psycopg import AsyncPsycopgSession, PsycopgSession
from fastq._tx.parts import AsyncSession, Session
from fastq.errors import EnqueueError

_TAKEN = (
    "a psycopg 3 Connection, a SQLAlchemy 2 Connection or Session over psycopg 3, or a Django connection over psycopg 3 "
    "(enqueue_tx, enqueue_many_tx); a psycopg 3 AsyncConnection, an asyncpg Connection, or a SQLAlchemy 2 AsyncConnection or "
    "AsyncSession over one of them (aenqueue_tx, aenqueue_many_tx)"
)


def _kinds(connection: object) -> set[str]:
    """The names of its classes, each with the package that it is of."""
    return {f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(connection).__mro__}


def _name(connection: object) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refuse(connection: object, word: str) -> TypeError:
    return TypeError(f"{word}, not {_name(connection)}; what is taken: {_TAKEN}")


def find_session(connection: Any) -> Session:
    """What carries statements out on a sync connection.

    Raises:
        TypeError: it is none that is taken.
        EnqueueError: it is in autocommit, in a pipeline, or to another kind of database.
    """
    kinds = _kinds(connection)
    if "psycopg.Connection" in kinds:
        return PsycopgSession(connection)
    if "sqlalchemy.scoped_session" in kinds:
        return find_session(connection())
    for kind in ("Connection", "Session"):
        if f"sqlalchemy.{kind}" in kinds:
            return on_sqlalchemy.find_session(connection, _find_driver, is_session=kind == "Session")
    if kinds & {"django.ConnectionProxy", "django.BaseDatabaseWrapper"}:
        if connection.vendor != "postgresql":
            raise EnqueueError(
                f"Django's connection is to a database of the kind {connection.vendor}, not to PostgreSQL"
            )
        return DjangoSession(connection, _find_psycopg)
    if kinds & {
        "psycopg.AsyncConnection",
        "asyncpg.Connection",
        "asyncpg.PoolConnectionProxy",
        "sqlalchemy.AsyncConnection",
        "sqlalchemy.AsyncSession",
        "sqlalchemy.async_scoped_session",
    }:
        raise _refuse(connection, "this call needs a sync connection (for an async one: `await producer.aenqueue_tx`)")
    raise _refuse(connection, "a connection is wanted")


async def find_async_session(connection: Any) -> AsyncSession:
    """What carries statements out on an async connection. Raises as `find_session`."""
    kinds = _kinds(connection)
    if kinds & {"psycopg.AsyncConnection", "asyncpg.Connection", "asyncpg.PoolConnectionProxy"}:
        return _find_async_driver(connection)
    if "sqlalchemy.async_scoped_session" in kinds:
        return await find_async_session(connection())
    for kind in ("AsyncConnection", "AsyncSession"):
        if f"sqlalchemy.{kind}" in kinds:
            return await on_sqlalchemy.find_async_session(
                connection, _find_async_driver, is_session=kind == "AsyncSession"
            )
    if kinds & {
        "psycopg.Connection",
        "sqlalchemy.Connection",
        "sqlalchemy.Session",
        "sqlalchemy.scoped_session",
        "django.ConnectionProxy",
        "django.BaseDatabaseWrapper",
    }:
        raise _refuse(
            connection,
            "this call needs an async connection (a sync one would hold up the event loop: enqueue_tx, in its thread)",
        )
    raise _refuse(connection, "a connection is wanted")


def _find_psycopg(raw: Any, how: str) -> PsycopgSession:
    if "psycopg.Connection" not in _kinds(raw):
        raise _refuse(raw, "under it must lie a psycopg 3 Connection")
    return PsycopgSession(raw, how)


def _find_driver(raw: Any, how: str) -> Session:
    return _find_psycopg(raw, how)


def _find_async_driver(raw: Any, how: str = "`async with conn.transaction():`") -> AsyncSession:
    kinds = _kinds(raw)
    if "psycopg.AsyncConnection" in kinds:
        return AsyncPsycopgSession(raw, how)
    if kinds & {"asyncpg.Connection", "asyncpg.PoolConnectionProxy"}:
        return AsyncpgSession(raw, how)
    raise _refuse(raw, "under it must lie a psycopg 3 AsyncConnection or an asyncpg Connection")


__all__ = ["find_async_session", "find_session"]
