"""asyncpg: `Connection`, and what a pool's ``acquire`` gives."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from fastq._tx.parts import COPY_COLUMNS, ENQUEUE, Answer, Purpose, Wake, no_transaction, read_array


class AsyncpgSession:
    """An `asyncpg.Connection`. Its cache of prepared statements is used as it is set."""

    def __init__(
        self, connection: Any, how: str = "`async with conn.transaction():`", purpose: Purpose = ENQUEUE
    ) -> None:
        self._connection = connection
        # The pool's proxy stands for the connection as long as it is acquired.
        self.raw = getattr(connection, "_con", None) or connection
        if not connection.is_closed() and not connection.is_in_transaction():
            raise no_transaction(how, purpose)

    async def query(self, text: str, params: Sequence[str]) -> Answer:
        # Loaded: the connection is of that package.
        rows = await self._connection.fetch(text, *params, record_class=sys.modules["asyncpg"].Record)
        return [read_array(value) for value in rows[0]]

    async def copy(self, schema: str, leaf: int, blocks: Iterable[bytes]) -> None:
        await self._connection.copy_to_table(
            f"task_{leaf:02}", schema_name=schema, columns=COPY_COLUMNS, source=_each(blocks), format="binary"
        )

    async def execute(self, text: str) -> None:
        await self._connection.execute(text)

    def after_commit(self, wake: Wake) -> None:
        """Asyncpg tells nobody of a commit."""


async def _each(blocks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block


__all__ = ["AsyncpgSession"]
