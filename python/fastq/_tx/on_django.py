"""Django: ``django.db.connection``, or any of ``django.db.connections``, with psycopg 3 under it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastq._tx.on_psycopg import PsycopgSession
from fastq._tx.parts import Answer, Wake


class DjangoSession:
    """A Django connection. Errors are Django's, with the driver's as their cause."""

    def __init__(self, connection: Any, find: Callable[[Any, str], PsycopgSession]) -> None:
        self._connection = connection
        # As for any statement of Django's: it connects, and refuses other threads and a block that is to be rolled back.
        with connection.cursor():
            connection.validate_no_broken_transaction()
        self._session = find(connection.connection, "`with transaction.atomic():`")
        self.raw = self._session.raw

    def query(self, text: str, params: Sequence[str]) -> Answer:
        with self._errors():
            return self._session.query(text, params)

    def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None:
        with self._errors():
            self._session.copy(schema, leaf, blocks)

    def execute(self, text: str) -> None:
        with self._errors():
            self._session.execute(text)

    def after_commit(self, wake: Wake) -> None:
        """By ``transaction.on_commit``: what a savepoint takes back is not told of."""
        # Who manages transactions by hand (set_autocommit) is told of none.
        if self._connection.in_atomic_block:
            self._connection.on_commit(lambda: wake(is_committed=True))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with self._connection.wrap_database_errors:
            yield


__all__ = ["DjangoSession"]
