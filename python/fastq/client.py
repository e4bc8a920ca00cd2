"""Look at tasks: one by its id, many by what they are, and how many there are. Cancel, retry, edit and delete them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from fastq import _lists, _plans
from fastq._actions import Action, not_found
from fastq._arguments import AS_IT_IS, Filters, check_id, read_change, read_filter
from fastq._db import Borrowed, UserConnection
from fastq._link import Link, borrowed
from fastq._lists import LIMIT, Order
from fastq._options import ClientOptions, read_client_options, read_duration, read_seconds
from fastq._plans import BATCH, Counts
from fastq._records import KINDS, LAST_ID, STATES, ConsumerRecord, FailedAttempt, Kind, Page, State, TaskRecord
from fastq._waiting import POLL_INTERVAL, Waits, refusal
from fastq._work import Plan, read
from fastq.settings import resolve_dsn, resolve_schema

T = TypeVar("T")


class Client:
    """Looks at the tasks of one fastq schema, and cancels, retries, edits and deletes them.

    Over one connection, made at the first call and again when it was lost. For any number of threads: they take turns. Usable as a
    context manager. To look takes a viewer's rights, to change a worker's.

    Args:
        dsn: the database, as libpq reads it; None: FASTQ_DSN.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.
        **options: ``connect_timeout`` (seconds or timedelta, 10 s), and ``statement_timeout`` (30 s): a statement whose answer takes
            longer counts as a lost connection.

    Raises:
        SettingsError: no dsn, or an unknown or wrong option.

    Every call may raise:
        SettingsError: the dsn or the schema's name can't be used, or an argument is wrong.
        SchemaError: the schema is not migrated, too old, or newer and shut to this fastq.
        ConnectionLost: the connection broke, and the one made in its place too; or no answer came within ``statement_timeout``.
        DatabaseError: no connection, the server refused, or the role lacks rights that a viewer has, or, for a call that changes
            tasks, a worker (``sqlstate`` 42501).
    """

    __slots__ = ("_link", "_waits")

    def __init__(self, dsn: str | None = None, *, schema: str | None = None, **options: Unpack[ClientOptions]) -> None:
        self._link = Link(resolve_dsn(dsn), resolve_schema(schema), read_client_options(options))
        self._waits = Waits(lambda ids: self._link.run(read("find_results", ids, walk=True)))

    def get_task(self, id: int) -> TaskRecord:  # noqa: A002 - the word that records and tables use
        """The task with its state and its failed attempts. Takes about as long with a million tasks as with ten.

        Raises:
            TaskNotFound: there is none, or it was removed at the end of its retention.
        """
        return self._link.run(_plans.get_task(self._link.schema, id))

    def wait(
        self,
        id: int,  # noqa: A002
        timeout: float | timedelta | None = None,
        *,
        poll_interval: float | timedelta = POLL_INTERVAL,
    ) -> Any:
        """Wait until a task has completed, in whatever process, and give what its handler returned.

        Its handler must keep it: ``result_ttl``, at `App.task`, `Consumer.handler` or `Consumer`. It looks for it over the client's one
        connection, first after 20 ms, then in pauses that grow to ``poll_interval``; the waits of several threads share their looks.

        Args:
            id: the task's, of a transaction that is committed.
            timeout: seconds, or a timedelta; 0: look once; None: for as long as it takes.
            poll_interval: seconds, or a timedelta, between two looks, at most.

        Returns:
            What the handler returned, as JSON has it, or the raw ``bytes``. None: the handler returned None.

        Raises:
            TaskFailed: it failed for good, was cancelled, or expired; ``task`` tells more.
            ResultNotKept: it has completed, and its result was not kept, or for no longer than this.
            TaskNotFound: there is none, or it was deleted meanwhile, or its retention is over.
            TimeoutError: it has not ended in this time. It goes on, and can be waited for again.
        """
        check_id(id)
        limit = None if timeout is None else read_seconds("timeout", timeout)
        pause = read_duration("poll_interval", poll_interval)
        if not 0 < id < LAST_ID:
            raise not_found(self._link.schema, id)
        deadline = None if limit is None else time.monotonic() + limit
        while (ending := self._waits.wait(id, deadline, pause)) is not None:
            if ending.place == "result":
                return ending.value
            if ending.place == "nowhere":
                raise not_found(self._link.schema, id)
            if (error := refusal(self.get_task(id))) is not None:
                raise error
        raise TimeoutError(f"task {id} has not ended within {limit:g} s")

    def list_tasks(
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
        """A page of the tasks that match all that is asked for (None: of any).

        A state is read from its own tables, so asking for ``running`` costs nothing for a million that completed. By ``id`` a page
        takes milliseconds, and where what is asked for is rare or far away it is answered after a fifth of a second or so with what
        was found: such a page has fewer tasks than ``limit``, or none, and a ``next`` that goes on from there. Ids follow the order
        of enqueueing, but for producers that enqueue seldom: each numbers its tasks from a block of its own. By ``created_at`` the
        order is exact, and all tasks of the states and types asked for are looked at, half a second to three a million.

        Args:
            states: any of the six states, ``"scheduled"`` and ``"retrying"``; ``"pending"`` includes these two.
            types: exact types.
            queues: exact names.
            priorities: 0 to 9.
            limit: at most so many tasks, 1 to 10,000.
            order_by: ``"id"``, or ``"created_at"`` (alike ones by id).
            descending: the newest first.
            after: ``next`` of the page before, which was asked for with the same order. A task that is enqueued or changes its state
                between two pages may be in none of them; none is in both unless it changed.
            first_id: no lower ids.
            last_id: no higher ids.
            created_since: enqueued then (aware) or later. No index knows times: tasks are looked at in order of ids, some hundred
                thousand a page, so a time far from where the list begins is found sooner with ``first_id`` or ``last_id``.
            created_before: enqueued before then (aware).
            payload_contains: this text, or these bytes, are in the payload as it is stored: JSON without blanks between its parts,
                letters as they are. Looks at the payloads of what matches otherwise, up to 32 MiB at a time. Only by ``id``.

        Raises:
            SettingsError: an argument is wrong.
            TypeError: a time is no datetime.
        """
        plan = _lists.list_tasks(
            (states, types, queues, priorities),
            (first_id, last_id, created_since, created_before, payload_contains),
            limit=limit,
            order_by=order_by,
            descending=descending,
            after=after,
        )
        return self._link.run(plan)

    @overload
    def counts(self, by: None = None, *, states: Sequence[State | Kind] | None = None) -> dict[str, int]: ...

    @overload
    def counts(
        self, by: Literal["queue", "type"], *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, dict[str, int]]: ...

    def counts(
        self, by: Literal["queue", "type"] | None = None, *, states: Sequence[State | Kind] | None = None
    ) -> Counts:
        """How many tasks are in each state, all at one moment.

        Args:
            by: split the numbers by queue or type: name → state → number.
            states: which to count; None: the six states. With ``"scheduled"`` or ``"retrying"`` among them these are counted
                apart, and still are part of ``"pending"``.

        Returns:
            State → number, with 0 for a state that no task is in.
        """
        return self._link.run(_plans.counts(by, states))

    def list_consumers(self) -> tuple[ConsumerRecord, ...]:
        """The consumers that are registered, the oldest first, with what they run.

        Those that live, and dead ones whose tasks have not all been rescued.
        """
        return self._link.run(_plans.list_consumers())

    # --- one task ------------------------------------------------------------------------------

    def cancel_task(self, id: int) -> TaskRecord:  # noqa: A002
        """Cancel a task that waits, runs, failed or expired. It counts when this returns: a task that waits never starts.

        The worker of one that runs, or is claimed to be run soon, is told (without ``listen`` it looks each 1 to 1.5 s while a handler has
        been at work for over a second): a coroutine is cancelled, a sync handler sees ``task.is_cancelled()``, and what has not started
        never does. What a handler returns all the same is refused and counted as such. A task that is cancelled already stays as it is.

        Returns:
            The task, cancelled.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it has completed.
        """
        return self._link.run(_plans.act(self._link.schema, "cancel", id))

    def cancel_task_tx(self, conn: UserConnection, id: int) -> TaskRecord:  # noqa: A002
        """As ``cancel_task``, in the transaction that is open on your own psycopg connection: it counts with your commit.

        Workers are not told, which would hold up other commits: where the handler has been at work for over a second its worker finds out
        by itself, within 1.5 s of your commit. Until then the task's row is locked: a worker's results of the same claim, and other changes
        of tasks of the same chunk, wait.
        A deadlock or a failed serialization is yours to repeat (``sqlstate`` 40P01, 40001).

        Args:
            conn: a ``psycopg.Connection``, in a transaction or without autocommit. It is never committed or rolled back here.
            id: the task's.

        Raises:
            SettingsError: the connection is in autocommit and in no transaction.
            TaskNotFound, InvalidTransition: as ``cancel_task``; the transaction is not aborted.
            DatabaseError: the server refused it, and the transaction is aborted.
        """
        return self._run_tx(conn, _plans.act(self._link.schema, "cancel", id))

    def retry_task(self, id: int) -> TaskRecord:  # noqa: A002
        """Make a task that failed, expired or was cancelled pending again, due now. Its attempts and their errors stay.

        Where no attempt is left it is granted one. It starts when the workers' leader next looks for due tasks, within their poll interval
        (1 second by default).

        Returns:
            The task as it waits.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it is pending or running, or has completed.
        """
        return self._link.run(_plans.act(self._link.schema, "retry", id))

    def retry_task_tx(self, conn: UserConnection, id: int) -> TaskRecord:  # noqa: A002
        """As ``retry_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        return self._run_tx(conn, _plans.act(self._link.schema, "retry", id))

    def delete_task(self, id: int) -> None:  # noqa: A002
        """Delete a task that does not run, with its payload, its failed attempts and its idempotency token, which is free again.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it runs. Cancel it first.
        """
        self._link.run(_plans.delete(self._link.schema, id))

    def delete_task_tx(self, conn: UserConnection, id: int) -> None:  # noqa: A002
        """As ``delete_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        self._run_tx(conn, _plans.delete(self._link.schema, id))

    def edit_task(
        self,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
    ) -> TaskRecord:
        """Change the payload, the time or the priority of a task that waits. Once this returns, nothing runs it as it was before.

        Args:
            id: the task's.
            payload: as `Task` takes it: anything that JSON can hold, or raw ``bytes``; at most 1 MiB encoded. Default: as it is.
            delay: seconds, or a timedelta, until it may start, counted by the database's clock from now. None: as it is.
            run_at: not before this time (aware); it wins over ``delay``, and a time gone by means now. None: as it is.
            priority: 0 to 9. With another one it comes last among those that wait with that priority, and workers see that within their
                poll interval (1 second by default). None: as it is.

        Returns:
            The task as it waits.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it does not wait (any more).
            PayloadError: the payload can't be encoded, or is over the limit.
            SettingsError: nothing to change is given, or a time, delay or priority that no task can have.
        """
        change = read_change(payload, delay, run_at, priority)
        return self._link.run(_plans.act(self._link.schema, "edit", id, change))

    def edit_task_tx(
        self,
        conn: UserConnection,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
    ) -> TaskRecord:
        """As ``edit_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``.

        A priority that no task of this queue and type has had is made known over the client's own connection, and stays known.

        Raises:
            DatabaseError: also where your transaction began before that priority was known and can't see it (``sqlstate`` 40001): roll
                it back and run it again.
        """
        change = read_change(payload, delay, run_at, priority)
        self._link.run(_plans.make_lane(self._link.schema, id, change))
        return self._run_tx(conn, _plans.act_tx(self._link.schema, "edit", id, change))

    # --- many tasks ----------------------------------------------------------------------------

    def count_tasks(self, action: Action | None = None, **tasks: Unpack[Filters]) -> int:
        """How many tasks match, and, with an action, how many of them it would change now: a look before ``cancel_tasks`` and the like.

        Args:
            action: ``"cancel"``, ``"retry"``, ``"delete"`` or ``"edit"``; None: count all that match.
            **tasks: ``states``, ``types``, ``queues``, ``priorities``, ``ids``, or as ``list_tasks``; see `Filters`.

        Raises:
            SettingsError: no filter is given, or one is wrong. Name all six states (`STATES`) if all tasks are meant.
        """
        return self._link.run(_plans.count_tasks(read_filter(action, tasks)))

    def cancel_tasks(self, **tasks: Unpack[Filters]) -> int:
        """Cancel the tasks that match and can be cancelled; what can't is left as it is. See ``cancel_task``.

        In order of ids and in transactions of 500 tasks, so that nobody waits for long; what is done stays done if a later one fails.
        A task that is enqueued, or comes into one of the states, while this runs may be left out: call it again until it answers 0.

        Args:
            **tasks: ``states``, ``types``, ``queues``, ``priorities``, ``ids``, or as ``list_tasks``; see `Filters`.

        Returns:
            How many were cancelled by this call. ``count_tasks("cancel", …)`` says beforehand how many it would be.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        return self._link.run(_plans.act_on_many("cancel", read_filter("cancel", tasks)))

    def retry_tasks(self, **tasks: Unpack[Filters]) -> int:
        """Make the tasks that match, and failed, expired or were cancelled, pending again. See ``retry_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        return self._link.run(_plans.act_on_many("retry", read_filter("retry", tasks)))

    def delete_tasks(self, **tasks: Unpack[Filters]) -> int:
        """Delete the tasks that match and don't run. See ``delete_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        return self._link.run(_plans.act_on_many("delete", read_filter("delete", tasks)))

    def edit_tasks(
        self,
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        **tasks: Unpack[Filters],
    ) -> int:
        """Give the tasks that match and wait another time or priority, or all the same payload. See ``edit_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            PayloadError: the payload can't be encoded, or is over the limit.
            SettingsError: no filter or nothing to change is given, or something of it is wrong.
        """
        wanted = read_filter("edit", tasks)
        return self._link.run(_plans.act_on_many("edit", wanted, read_change(payload, delay, run_at, priority)))

    def close(self) -> None:
        """Close the connection. Idempotent; a later call makes a new one."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run_tx(self, conn: UserConnection, plan: Plan[T]) -> T:
        return borrowed(plan, Borrowed(conn, self._link.schema))


__all__ = [
    "BATCH",
    "KINDS",
    "LIMIT",
    "STATES",
    "Action",
    "Client",
    "ConsumerRecord",
    "FailedAttempt",
    "Filters",
    "Kind",
    "Order",
    "Page",
    "State",
    "TaskRecord",
]
