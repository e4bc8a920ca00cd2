"""Finds what a connection is, by its class, without importing its package."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastq._tx import on_sqlalchemy
from fastq._tx.on_asyncpg import AsyncpgSession
from fastq._tx.on_django import DjangoSession
from fastq._tx.on_psycopg import AsyncPsycopgSession, PsycopgSession
from fastq._tx.parts import ENQUEUE, AsyncSession, Purpose, Session


def _kinds(connection: object) -> set[str]:
    """The names of its classes, each with the package that it is of."""
    return {f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(connection).__mro__}


def _name(connection: object) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refuse(connection: object, word: str, purpose: Purpose) -> TypeError:
    return TypeError(
        f"{word}, not {_name(connection)}; what is taken: a psycopg 3 Connection, a SQLAlchemy 2 Connection or Session over "
        f"psycopg 3, or a Django connection over psycopg 3 ({purpose.sync_names}); a psycopg 3 AsyncConnection, an asyncpg "
        f"Connection, or a SQLAlchemy 2 AsyncConnection or AsyncSession over one of them ({purpose.async_names})"
    )


def find_session(connection: Any, purpose: Purpose = ENQUEUE) -> Session:
    """What carries statements out on a sync connection.

    Raises:
        TypeError: it is none that is taken.
        EnqueueError: it is in autocommit, in a pipeline, or to another kind of database; the class is the purpose's.
    """
    kinds = _kinds(connection)
    if "psycopg.Connection" in kinds:
        return PsycopgSession(connection, purpose=purpose)
    if "sqlalchemy.scoped_session" in kinds:
        return find_session(connection(), purpose)
    find = partial(_find_psycopg, purpose=purpose)
    for kind in ("Connection", "Session"):
        if f"sqlalchemy.{kind}" in kinds:
            return on_sqlalchemy.find_session(connection, find, purpose, is_session=kind == "Session")
    if kinds & {"django.ConnectionProxy", "django.BaseDatabaseWrapper"}:
        if connection.vendor != "postgresql":
            raise purpose.error(
                f"Django's connection is to a database of the kind {connection.vendor}, not to PostgreSQL"
            )
        return DjangoSession(connection, find)
    if kinds & {
        "psycopg.AsyncConnection",
        "asyncpg.Connection",
        "asyncpg.PoolConnectionProxy",
        "sqlalchemy.AsyncConnection",
        "sqlalchemy.AsyncSession",
        "sqlalchemy.async_scoped_session",
    }:
        wanted = f"this call needs a sync connection (for an async one: `{purpose.asynchronous}`)"
        raise _refuse(connection, wanted, purpose)
    raise _refuse(connection, "a connection is wanted", purpose)


async def find_async_session(connection: Any, purpose: Purpose = ENQUEUE) -> AsyncSession:
    """What carries statements out on an async connection. Raises as `find_session`."""
    kinds = _kinds(connection)
    if kinds & {"psycopg.AsyncConnection", "asyncpg.Connection", "asyncpg.PoolConnectionProxy"}:
        return _find_async_driver(connection, purpose=purpose)
    if "sqlalchemy.async_scoped_session" in kinds:
        return await find_async_session(connection(), purpose)
    find = partial(_find_async_driver, purpose=purpose)
    for kind in ("AsyncConnection", "AsyncSession"):
        if f"sqlalchemy.{kind}" in kinds:
            return await on_sqlalchemy.find_async_session(connection, find, purpose, is_session=kind == "AsyncSession")
    if kinds & {
        "psycopg.Connection",
        "sqlalchemy.Connection",
        "sqlalchemy.Session",
        "sqlalchemy.scoped_session",
        "django.ConnectionProxy",
        "django.BaseDatabaseWrapper",
    }:
        wanted = f"this call needs an async connection (a sync one would hold up the event loop: {purpose.sync}, in its thread)"
        raise _refuse(connection, wanted, purpose)
    raise _refuse(connection, "a connection is wanted", purpose)


def _find_psycopg(raw: Any, how: str, purpose: Purpose) -> PsycopgSession:
    if "psycopg.Connection" not in _kinds(raw):
        raise _refuse(raw, "under it must lie a psycopg 3 Connection", purpose)
    return PsycopgSession(raw, how, purpose)


def _find_async_driver(raw: Any, how: str = "`async with conn.transaction():`", *, purpose: Purpose) -> AsyncSession:
    kinds = _kinds(raw)
    if "psycopg.AsyncConnection" in kinds:
        return AsyncPsycopgSession(raw, how, purpose)
    if kinds & {"asyncpg.Connection", "asyncpg.PoolConnectionProxy"}:
        return AsyncpgSession(raw, how, purpose)
    raise _refuse(raw, "under it must lie a psycopg 3 AsyncConnection or an asyncpg Connection", purpose)


__all__ = ["find_async_session", "find_session"]
