"""The client for async code: what `Client` does, on the caller's event loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from fastq import _lists, _plans
from fastq._actions import Action, not_found
from fastq._arguments import AS_IT_IS, Filters, check_id, read_change, read_filter
from fastq._db import AsyncBorrowed, AsyncUserConnection
from fastq._link import AsyncLink, aborrowed
from fastq._lists import Order
from fastq._options import ClientOptions, read_client_options, read_duration, read_seconds
from fastq._plans import Counts
from fastq._records import LAST_ID, ConsumerRecord, Kind, Page, State, TaskRecord
from fastq._waiting import POLL_INTERVAL, AsyncWaits, refusal
from fastq._work import Plan, read
from fastq.settings import resolve_dsn, resolve_schema

T = TypeVar("T")


class AsyncClient:
    """As `Client`: each method does what the one of the same name there does, takes the same, and raises the same.

    Over one connection, made at the first call and again when it was lost. For any number of coroutines of one event loop: they take
    turns. Once that loop is closed, another may use it. Usable as an async context manager. A call that is cancelled is cancelled
    on the server too, and the connection given up; one that was just being committed may have been done.

    Args:
        dsn: as `Client`.
        schema: as `Client`.
        **options: as `Client`.

    Raises:
        SettingsError: no dsn, or an unknown or wrong option.

    Every call may raise what those of `Client` may, and:
        SettingsError: it is in use on another event loop.
    """

    __slots__ = ("_link", "_waits")

    def __init__(self, dsn: str | None = None, *, schema: str | None = None, **options: Unpack[ClientOptions]) -> None:
        self._link = AsyncLink(resolve_dsn(dsn), resolve_schema(schema), read_client_options(options))
        self._waits = AsyncWaits(lambda ids: self._link.run(read("find_results", ids, walk=True)))

    async def get_task(self, id: int) -> TaskRecord:  # noqa: A002 - the word that records and tables use
        """As `Client.get_task`."""
        return await self._link.run(_plans.get_task(self._link.schema, id))

    async def wait(
        self,
        id: int,  # noqa: A002
        timeout: float | timedelta | None = None,  # noqa: ASYNC109 - as `Client.wait` has it
        *,
        poll_interval: float | timedelta = POLL_INTERVAL,
    ) -> Any:
        """As `Client.wait`. The waits of several coroutines share their looks."""
        check_id(id)
        limit = None if timeout is None else read_seconds("timeout", timeout)
        pause = read_duration("poll_interval", poll_interval)
        if not 0 < id < LAST_ID:
            raise not_found(self._link.schema, id)
        deadline = None if limit is None else time.monotonic() + limit
        while (ending := await self._waits.wait(id, deadline, pause)) is not None:
            if ending.place == "result":
                return ending.value
            if ending.place == "nowhere":
                raise not_found(self._link.schema, id)
            if (error := refusal(await self.get_task(id))) is not None:
                raise error
        raise TimeoutError(f"task {id} has not ended within {limit:g} s")

    async def list_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        priorities: Sequence[int] | None = None,
        limit: int = 50,
        order_by: Order = "id",
        descending: bool = True,
        after: str | None = None,
        first_id: int | None = None,
        last_id: int | None = None,
        created_since: datetime | None = None,
        created_before: datetime | None = None,
        payload_contains: str | bytes | None = None,
    ) -> Page:
        """As `Client.list_tasks`."""
        plan = _lists.list_tasks(
            (states, types, queues, priorities),
            (first_id, last_id, created_since, created_before, payload_contains),
            limit=limit,
            order_by=order_by,
            descending=descending,
            after=after,
        )
        return await self._link.run(plan)

    @overload
    async def counts(self, by: None = None, *, states: Sequence[State | Kind] | None = None) -> dict[str, int]: ...

    @overload
    async def counts(
        self, by: Literal["queue", "type"], *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, dict[str, int]]: ...

    async def counts(
        self, by: Literal["queue", "type"] | None = None, *, states: Sequence[State | Kind] | None = None
    ) -> Counts:
        """As `Client.counts`."""
        return await self._link.run(_plans.counts(by, states))

    async def list_consumers(self) -> tuple[ConsumerRecord, ...]:
        """As `Client.list_consumers`."""
        return await self._link.run(_plans.list_consumers())

    # --- one task ------------------------------------------------------------------------------

    async def cancel_task(self, id: int) -> TaskRecord:  # noqa: A002
        """As `Client.cancel_task`."""
        return await self._link.run(_plans.act(self._link.schema, "cancel", id))

    async def cancel_task_tx(self, conn: AsyncUserConnection, id: int) -> TaskRecord:  # noqa: A002
        """As `Client.cancel_task_tx`, on a ``psycopg.AsyncConnection``. Cancelled, it leaves your transaction to be rolled back."""
        return await self._run_tx(conn, _plans.act(self._link.schema, "cancel", id))

    async def retry_task(self, id: int) -> TaskRecord:  # noqa: A002
        """As `Client.retry_task`."""
        return await self._link.run(_plans.act(self._link.schema, "retry", id))

    async def retry_task_tx(self, conn: AsyncUserConnection, id: int) -> TaskRecord:  # noqa: A002
        """As ``retry_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        return await self._run_tx(conn, _plans.act(self._link.schema, "retry", id))

    async def delete_task(self, id: int) -> None:  # noqa: A002
        """As `Client.delete_task`."""
        await self._link.run(_plans.delete(self._link.schema, id))

    async def delete_task_tx(self, conn: AsyncUserConnection, id: int) -> None:  # noqa: A002
        """As ``delete_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        await self._run_tx(conn, _plans.delete(self._link.schema, id))

    async def edit_task(
        self,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
    ) -> TaskRecord:
        """As `Client.edit_task`."""
        change = read_change(payload, delay, run_at, priority)
        return await self._link.run(_plans.act(self._link.schema, "edit", id, change))

    async def edit_task_tx(
        self,
        conn: AsyncUserConnection,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
    ) -> TaskRecord:
        """As ``edit_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        change = read_change(payload, delay, run_at, priority)
        await self._link.run(_plans.make_lane(self._link.schema, id, change))
        return await self._run_tx(conn, _plans.act_tx(self._link.schema, "edit", id, change))

    # --- many tasks ----------------------------------------------------------------------------

    async def count_tasks(self, action: Action | None = None, **tasks: Unpack[Filters]) -> int:
        """As `Client.count_tasks`."""
        return await self._link.run(_plans.count_tasks(read_filter(action, tasks)))

    async def cancel_tasks(self, **tasks: Unpack[Filters]) -> int:
        """As `Client.cancel_tasks`. Cancelled on the way, it leaves done what is done."""
        return await self._link.run(_plans.act_on_many("cancel", read_filter("cancel", tasks)))

    async def retry_tasks(self, **tasks: Unpack[Filters]) -> int:
        """As `Client.retry_tasks`."""
        return await self._link.run(_plans.act_on_many("retry", read_filter("retry", tasks)))

    async def delete_tasks(self, **tasks: Unpack[Filters]) -> int:
        """As `Client.delete_tasks`."""
        return await self._link.run(_plans.act_on_many("delete", read_filter("delete", tasks)))

    async def edit_tasks(
        self,
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        **tasks: Unpack[Filters],
    ) -> int:
        """As `Client.edit_tasks`."""
        wanted = read_filter("edit", tasks)
        return await self._link.run(_plans.act_on_many("edit", wanted, read_change(payload, delay, run_at, priority)))

    async def close(self) -> None:
        """Close the connection. Idempotent; a later call makes a new one."""
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _run_tx(self, conn: AsyncUserConnection, plan: Plan[T]) -> T:
        return await aborrowed(plan, AsyncBorrowed(conn, self._link.schema))


__all__ = ["AsyncClient"]
