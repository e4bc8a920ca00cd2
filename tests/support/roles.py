"""Roles that own nothing, with the rights that `fastq migrate --grants` prints and no others."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from fastq.rights import Kind, grants
from tests.support.databases import Database
from tests.support.faults.server import PrivateServer


@contextmanager
def database_with_admin(database: Database) -> Iterator[Database]:
    """The session's database, or, where that was given without a superuser, one in a server of the test's own."""
    if database.admin_dsn is not None:
        yield database
        return
    with PrivateServer() as server:
        yield Database(server.dsn, server.superuser_dsn)


class Roles:
    """Makes roles by a superuser, and has the schema's owner grant them rights. They go at the end."""

    def __init__(self, database: Database, schema: str) -> None:
        assert database.admin_dsn is not None
        self._stack = ExitStack()
        self._admin = self._stack.enter_context(psycopg.connect(database.admin_dsn, autocommit=True))
        self._dsn = database.dsn
        self._schema = schema
        self._names: list[str] = []

    def add(self, name: str | None = None) -> tuple[str, str]:
        """A role that may log in, and nothing else. Gives its name and connection string."""
        name, password = name or f"role_{secrets.token_hex(5)}", secrets.token_hex(16)
        self._admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), password))
        self._names.append(name)
        return name, make_conninfo(self._dsn, user=name, password=password)

    def grant(self, name: str, kind: Kind) -> None:
        """The schema's owner runs what is printed for this kind."""
        self.as_owner(grants(schema=self._schema, **{kind: name}))

    def new(self, kind: Kind) -> tuple[str, str]:
        """A role with this kind's rights. Gives its name and connection string."""
        name, dsn = self.add()
        self.grant(name, kind)
        return name, dsn

    def as_owner(self, script: str) -> None:
        """Statements of the schema's owner, who is no superuser."""
        with psycopg.connect(self._dsn, autocommit=True) as owner:
            owner.execute(script.encode())

    def as_admin(self, script: str) -> None:
        """Statements of the superuser."""
        self._admin.execute(script.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for name in self._names:
            self._admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            self._admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
        self._stack.close()
