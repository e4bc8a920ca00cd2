"""Look at tasks: one by its id, many by what they are, and how many there are. Cancel, retry, edit and delete them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar, Unpack, overload

from fastq import migrations
from fastq._actions import Action, Change, Query, act_on_batch, act_on_one
from fastq._arguments import AS_IT_IS, Filter, check_id, read_change, read_filter, read_texts
from fastq._db import Borrowed, UserConnection
from fastq._link import Link
from fastq._options import ClientOptions, read_client_options, read_duration, read_seconds
from fastq._records import (
    KINDS,
    LAST_ID,
    STATES,
    WAITING,
    FailedAttempt,
    Kind,
    Page,
    State,
    TaskRecord,
    check_states,
    places_of,
    to_record,
)
from fastq._waiting import POLL_INTERVAL, Waits, refusal
from fastq.errors import SettingsError, TaskNotFound
from fastq.settings import resolve_dsn, resolve_schema

T = TypeVar("T")
Order: TypeAlias = Literal["created_at", "id"]

#: A page holds at most this many tasks: their payloads are in memory together.
LIMIT: Final = 10_000
#: Tasks that one transaction of a call for many changes: their rows stay locked until its commit, a few milliseconds later.
BATCH: Final = 500

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_AFTER: Final = re.compile(r"(?P<order>id|created_at)-(?P<way>up|down)-(?P<time>-?\d{1,17})-(?P<id>\d{1,18})", re.ASCII)
_NO_CHANGE: Final = Change()
# What may be done again although it may have been done: it comes to the same.
_REPEATABLE: Final[frozenset[Action]] = frozenset({"cancel", "edit"})


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
        self._waits = Waits(lambda ids: self._link.read("find_results", ids, walk=True))

    def get_task(self, id: int) -> TaskRecord:  # noqa: A002 - the word that records and tables use
        """The task with its state and its failed attempts. Takes about as long with a million tasks as with ten.

        Raises:
            TaskNotFound: there is none, or it was removed at the end of its retention.
        """
        check_id(id)
        rows = self._link.read("find_task", id, walk=True) if 0 < id <= LAST_ID else []
        if not rows:
            raise self._not_found(id)
        return to_record(rows[0], with_errors=True)

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
            raise self._not_found(id)
        deadline = None if limit is None else time.monotonic() + limit
        while (ending := self._waits.wait(id, deadline, pause)) is not None:
            if ending.place == "result":
                return ending.value
            if ending.place == "nowhere":
                raise self._not_found(id)
            if (error := refusal(self.get_task(id))) is not None:
                raise error
        raise TimeoutError(f"task {id} has not ended within {limit:g} s")

    def list_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        limit: int = 50,
        order_by: Order = "created_at",
        descending: bool = True,
        after: str | None = None,
    ) -> Page:
        """A page of the tasks that are in one of ``states`` and of one of ``types`` and ``queues`` (None: of any).

        A state is read from its own tables, so asking for ``running`` costs nothing for a million that completed. By ``id`` a page
        takes milliseconds; by ``created_at`` all tasks of the states asked for are looked at, half a second to three a million:
        ids follow the order of enqueueing only roughly, as each producer numbers its tasks from a block of its own.

        Args:
            states: any of the six states, ``"scheduled"`` and ``"retrying"``; ``"pending"`` includes these two.
            types: exact types.
            queues: exact names.
            limit: at most so many tasks, 1 to 10,000.
            order_by: ``"created_at"`` (alike ones by id) or ``"id"``.
            descending: the newest first.
            after: ``next`` of the page before, which was asked for with the same order. A task that is enqueued or changes its state
                between two pages may be in none of them; none is in both unless it changed.
        """
        places = places_of(states)
        if limit.__class__ is not int or not 1 <= limit <= LIMIT:
            raise SettingsError(f"limit is {limit!r}, but must be a whole number from 1 to {LIMIT:,}")
        if order_by not in ("created_at", "id"):
            raise SettingsError(f"order_by is {order_by!r}, but must be 'created_at' or 'id'")
        time, last_id = _from_after(after, order_by, descending=descending)
        lanes = self._lanes_of(types, queues)
        # One more than wanted tells whether there are more.
        parts = (limit + 1, last_id, lanes, *places.params)
        if order_by == "created_at":
            rows = self._link.read("list_tasks_by_created_at", *parts, time, descending, walk=False)
        elif descending:
            rows = self._link.read("list_tasks_by_id_descending", *parts, walk=True)
        else:
            rows = self._link.read("list_tasks_by_id_ascending", *parts, walk=True)
        tasks = tuple(to_record(row, with_errors=False) for row in rows[:limit])
        more = len(rows) > limit
        return Page(tasks, _to_after(tasks[-1], order_by, descending=descending) if more else None)

    @overload
    def counts(self, by: None = None, *, states: Sequence[State | Kind] | None = None) -> dict[str, int]: ...

    @overload
    def counts(
        self, by: Literal["queue", "type"], *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, dict[str, int]]: ...

    def counts(
        self, by: Literal["queue", "type"] | None = None, *, states: Sequence[State | Kind] | None = None
    ) -> dict[str, int] | dict[str, dict[str, int]]:
        """How many tasks are in each state, all at one moment.

        Args:
            by: split the numbers by queue or type: name → state → number.
            states: which to count; None: the six states. With ``"scheduled"`` or ``"retrying"`` among them these are counted
                apart, and still are part of ``"pending"``.

        Returns:
            State → number, with 0 for a state that no task is in.
        """
        wanted: tuple[State | Kind, ...] = STATES if states is None else tuple(check_states(states))
        if by not in (None, "queue", "type"):
            raise SettingsError(f"by is {by!r}, but must be None, 'queue' or 'type'")
        split: dict[str, dict[str, int]] = {}
        for queue, type_, found, tasks in self._link.read("count_tasks", walk=False):
            name = "" if by is None else queue if by == "queue" else type_
            numbers = split.setdefault(name, dict.fromkeys(wanted, 0))
            for state in ("pending", found) if found in WAITING else (found,):
                if state in numbers:
                    numbers[state] += tasks
        return split if by is not None else split.get("", dict.fromkeys(wanted, 0))

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
        return _known(self._act("cancel", id))

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
        return _known(self._act_tx(conn, "cancel", id))

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
        return _known(self._act("retry", id))

    def retry_task_tx(self, conn: UserConnection, id: int) -> TaskRecord:  # noqa: A002
        """As ``retry_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        return _known(self._act_tx(conn, "retry", id))

    def delete_task(self, id: int) -> None:  # noqa: A002
        """Delete a task that does not run, with its payload, its failed attempts and its idempotency token, which is free again.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it runs. Cancel it first.
        """
        self._act("delete", id)

    def delete_task_tx(self, conn: UserConnection, id: int) -> None:  # noqa: A002
        """As ``delete_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        self._act_tx(conn, "delete", id)

    def edit_task(
        self,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
    ) -> TaskRecord:
        """Change the payload or the time of a task that waits. Once this returns, nothing runs it as it was before.

        Args:
            id: the task's.
            payload: as `Task` takes it: anything that JSON can hold, or raw ``bytes``; at most 1 MiB encoded. Default: as it is.
            delay: seconds, or a timedelta, until it may start, counted by the database's clock from now. None: as it is.
            run_at: not before this time (aware); it wins over ``delay``, and a time gone by means now. None: as it is.

        Returns:
            The task as it waits.

        Raises:
            TaskNotFound: there is none.
            InvalidTransition: it does not wait (any more).
            PayloadError: the payload can't be encoded, or is over the limit.
            SettingsError: nothing to change is given, or a time or delay that no task can have.
        """
        return _known(self._act("edit", id, read_change(payload, delay, run_at)))

    def edit_task_tx(
        self,
        conn: UserConnection,
        id: int,  # noqa: A002
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
    ) -> TaskRecord:
        """As ``edit_task``, in the transaction that is open on your own psycopg connection. See ``cancel_task_tx``."""
        return _known(self._act_tx(conn, "edit", id, read_change(payload, delay, run_at)))

    # --- many tasks ----------------------------------------------------------------------------

    def count_tasks(
        self,
        action: Action | None = None,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """How many tasks match, and, with an action, how many of them it would change now: a look before ``cancel_tasks`` and the like.

        Args:
            action: ``"cancel"``, ``"retry"``, ``"delete"`` or ``"edit"``; None: count all that match.
            states: any of the six states, ``"scheduled"`` and ``"retrying"``; None: in any.
            types: exact types; None: of any.
            queues: exact names; None: of any.
            ids: these tasks alone; None: all.

        Raises:
            SettingsError: no filter is given, or one is wrong. Name all six states (`STATES`) if all tasks are meant.
        """
        wanted = read_filter(action, states=states, types=types, queues=queues, ids=ids)
        if wanted.ids is not None:
            return sum(len(found) for found in self._pick(wanted))
        return sum(
            tasks
            for queue, type_, place, tasks in self._link.read("count_tasks", walk=False)
            if place in wanted.places
            and (wanted.types is None or type_ in wanted.types)
            and (wanted.queues is None or queue in wanted.queues)
        )

    def cancel_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """Cancel the tasks that match and can be cancelled; what can't is left as it is. See ``cancel_task``.

        In order of ids and in transactions of 500 tasks, so that nobody waits for long; what is done stays done if a later one fails.
        A task that is enqueued, or comes into one of the states, while this runs may be left out: call it again until it answers 0.

        Args:
            states: any of the six states, ``"scheduled"`` and ``"retrying"``; None: all that can be cancelled.
            types: exact types; None: of any.
            queues: exact names; None: of any.
            ids: these tasks alone; None: all.

        Returns:
            How many were cancelled by this call. ``count_tasks("cancel", …)`` says beforehand how many it would be.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        wanted = read_filter("cancel", states=states, types=types, queues=queues, ids=ids)
        return self._act_on_many("cancel", wanted)

    def retry_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """Make the tasks that match, and failed, expired or were cancelled, pending again. See ``retry_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        wanted = read_filter("retry", states=states, types=types, queues=queues, ids=ids)
        return self._act_on_many("retry", wanted)

    def delete_tasks(
        self,
        *,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """Delete the tasks that match and don't run. See ``delete_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            SettingsError: no filter is given, or one is wrong.
        """
        wanted = read_filter("delete", states=states, types=types, queues=queues, ids=ids)
        return self._act_on_many("delete", wanted)

    def edit_tasks(
        self,
        *,
        payload: object = AS_IT_IS,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        states: Sequence[State | Kind] | None = None,
        types: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """Give the tasks that match and wait another time, or all the same payload. See ``edit_task`` and ``cancel_tasks``.

        Returns:
            How many.

        Raises:
            PayloadError: the payload can't be encoded, or is over the limit.
            SettingsError: no filter or nothing to change is given, or something of it is wrong.
        """
        wanted = read_filter("edit", states=states, types=types, queues=queues, ids=ids)
        return self._act_on_many("edit", wanted, read_change(payload, delay, run_at))

    def close(self) -> None:
        """Close the connection. Idempotent; a later call makes a new one."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- how tasks are changed -----------------------------------------------------------------

    def _act(self, action: Action, id_: int, change: Change = _NO_CHANGE) -> TaskRecord | None:
        check_id(id_)
        if not 0 < id_ < LAST_ID:
            raise self._not_found(id_)

        def within(work: Callable[[Query], T]) -> T:
            return self._link.within(work, repeatable=action in _REPEATABLE)

        return act_on_one(within, self._link.schema, action, id_, change)

    def _act_tx(self, conn: UserConnection, action: Action, id_: int, change: Change = _NO_CHANGE) -> TaskRecord | None:
        check_id(id_)
        db = Borrowed(conn, self._link.schema)
        migrations.check(db)
        if not 0 < id_ < LAST_ID:
            raise self._not_found(id_)

        def within(work: Callable[[Query], T]) -> T:
            return work(db.query)

        return act_on_one(within, self._link.schema, action, id_, change)

    def _act_on_many(self, action: Action, wanted: Filter, change: Change = _NO_CHANGE) -> int:
        def within(work: Callable[[Query], T]) -> T:
            return self._link.within(work, repeatable=False)

        return sum(act_on_batch(within, action, batch, wanted.places, change) for batch in self._pick(wanted))

    def _pick(self, wanted: Filter) -> Iterator[list[int]]:
        """The ids of the tasks that match, in order and in batches; each is looked for when it is its turn."""
        lanes = self._lanes_of(wanted.types, wanted.queues)
        places = wanted.places
        if not places or lanes == []:
            return
        if wanted.ids is not None:
            for i in range(0, len(wanted.ids), BATCH):
                found = self._link.read("locate_tasks", wanted.ids[i : i + BATCH], walk=True)
                if batch := [id_ for id_, lane, place in found if place in places and (lanes is None or lane in lanes)]:
                    yield batch
            return
        last = 0
        while batch := [id_ for (id_,) in self._link.read("pick_tasks", BATCH, last, lanes, *places.params, walk=True)]:
            yield batch
            last = batch[-1]

    def _lanes_of(self, types: Sequence[str] | None, queues: Sequence[str] | None) -> list[int] | None:
        """The lanes of these types and queues; None: all."""
        if types is None and queues is None:
            return None
        rows = self._link.read("find_lanes", read_texts("types", types), read_texts("queues", queues), walk=False)
        return [lane for (lane,) in rows]

    def _not_found(self, id_: int) -> TaskNotFound:
        return TaskNotFound(
            f"there is no task {id_} in schema {self._link.schema!r}: it never was, or its retention is over"
        )


def _to_after(last: TaskRecord, order_by: Order, *, descending: bool) -> str:
    time = (last.created_at - _EPOCH) // timedelta(microseconds=1)
    return f"{order_by}-{'down' if descending else 'up'}-{time}-{last.id}"


def _from_after(after: object, order_by: Order, *, descending: bool) -> tuple[datetime | None, int]:
    if after is None:
        return None, LAST_ID if descending else 0
    found = _AFTER.fullmatch(after) if isinstance(after, str) else None
    if found is None or found["order"] != order_by or found["way"] != ("down" if descending else "up"):
        raise SettingsError(f"after is {after!r}, but must be `next` of a page that was listed in the same order")
    return _EPOCH + timedelta(microseconds=int(found["time"])), int(found["id"])


def _known(record: TaskRecord | None) -> TaskRecord:
    # Only a deletion leaves nothing to answer.
    assert record is not None  # noqa: S101
    return record


__all__ = [
    "BATCH",
    "KINDS",
    "LIMIT",
    "STATES",
    "Action",
    "Client",
    "FailedAttempt",
    "Kind",
    "Order",
    "Page",
    "State",
    "TaskRecord",
]
