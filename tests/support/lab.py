"""Everything that a test of the engine's promises needs: consumers that look around often, workers to kill, and plain SQL."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, LiteralString, Self

import psycopg
from psycopg import sql

from fastq import Consumer, Producer, Task, TaskInfo
from tests.support.consuming import new_consumer, states
from tests.support.faults.journal import Journal
from tests.support.faults.processes import Gate, WorkerProcess
from tests.support.links import Links
from tests.support.waiting import PATIENCE, wait_until

#: Durations in seconds, a tenth of the defaults. A machine that stands still for a second would kill no one.
QUICK: Final[dict[str, Any]] = {"heartbeat_interval": 0.2, "dead_after": 1.2, "lease": 0.6, "poll_interval": 0.2}


class Runs:
    """A handler that writes down what it runs. A task with the payload ``"hold"`` waits until `release` is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[tuple[int, int]] = []
        self.release = threading.Event()
        self.ended: Counter[int] = Counter()

    def __call__(self, task: TaskInfo) -> None:
        """The handler."""
        with self._lock:
            self._started.append((task.id, task.attempt))
        if task.payload == "hold":
            assert self.release.wait(60), "the test never released its handlers"
        with self._lock:
            self.ended[task.id] += 1

    @property
    def started(self) -> list[tuple[int, int]]:
        """Ids and attempts in the order in which they started."""
        with self._lock:
            return list(self._started)

    @property
    def ids(self) -> list[int]:
        """Ids in the order in which they started."""
        return [id_ for id_, _ in self.started]


class Lab:
    """A migrated schema with a producer. All that is made here ends with it. ``settings`` are those of consumers and workers
    that are not told others."""

    def __init__(
        self, dsn: str, schema: str, db: psycopg.Connection, folder: Path, settings: Mapping[str, Any] = QUICK
    ) -> None:
        self.dsn = dsn
        self.schema = schema
        self.db = db
        self._folder = folder
        self._settings = dict(settings)
        self._stack = ExitStack()
        self._count = 0
        self._links: list[Links] = []
        self.journal = Journal(folder / "journal")
        self.producer = self._stack.enter_context(Producer(dsn, schema=schema))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # What is held here would hold up the ends of consumers.
        for links in self._links:
            links.accept()
            links.flow()
        self._stack.close()

    # --- who works ---------------------------------------------------------------------------------

    def consumer(self, handler: Callable[[TaskInfo], object] | None = None, **settings: Any) -> Consumer:
        """One for type ``t``, started; without a handler, one that only does its upkeep. ``timeout`` is the handler's."""
        timeout = settings.pop("timeout", None)
        dsn = settings.pop("dsn", self.dsn)
        type_ = settings.pop("type", "t" if handler is not None else "nothing of the kind")
        consumer = new_consumer(dsn, self.schema, **(self._settings | settings))
        consumer.handler(type_, timeout=timeout)(handler or (lambda _: None))
        consumer.start()
        self._stack.callback(_stop, consumer, handler)
        return consumer

    def worker(
        self,
        *,
        types: Mapping[str, int | None] | None = None,
        is_async: bool = False,
        retry: float | None = 0.0,
        switch_interval: float | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> WorkerProcess:
        """A process with a consumer, by default for type ``t``; see `WorkerProcess`."""
        self._count += 1
        log = self._folder / f"worker-{self._count}.log"
        settings = {"dsn": self.dsn, "schema": self.schema, **self._settings, **settings}
        return self._stack.enter_context(
            WorkerProcess(
                self.journal,
                log,
                settings,
                types=types,
                is_async=is_async,
                retry=retry,
                switch_interval=switch_interval,
                env=env,
            )
        )

    def links(self) -> Links:
        """A proxy in front of the database."""
        self._links.append(self._stack.enter_context(Links(self.dsn)))
        return self._links[-1]

    def gate(self) -> Gate:
        """A gate that is shut; it is opened at the end."""
        self._count += 1
        gate = Gate(self._folder / f"gate-{self._count}")
        self._stack.callback(gate.open)
        return gate

    # --- tasks -------------------------------------------------------------------------------------

    def enqueue(self, *payloads: Any, count: int | None = None, **options: Any) -> list[int]:
        """Tasks of type ``t`` with these payloads, or so many without any. Gives their ids."""
        return self.enqueue_type("t", *(payloads if count is None else (None,) * count), **options)

    def enqueue_others(self, *payloads: Any) -> list[int]:
        """Tasks of type ``other``, for which only a test that makes one has a consumer. Gives their ids."""
        return self.enqueue_type("other", *payloads)

    def enqueue_type(self, type_: str, /, *payloads: Any, **options: Any) -> list[int]:
        """Tasks of any type with these payloads. Gives their ids."""
        return [result.id for result in self.producer.enqueue_many(Task(type_, each, **options) for each in payloads)]

    def wait_for(self, *, within: float = PATIENCE, **wanted: int) -> None:
        """Waits until the tasks are in these states."""
        wait_until(lambda: states(self.db) == wanted, timeout=within, message=f"tasks in the states {wanted}")

    def completions(self) -> dict[int, int]:
        """By id: how many runs it took, of each task that was completed. Fails where one was completed twice."""
        rows = self.all("SELECT i, attempts FROM done, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i")
        found = dict(rows)
        assert len(found) == len(rows), "a task was completed twice"
        return found

    def losses(self) -> Counter[int]:
        """By id: how many runs were lost with their workers."""
        return Counter(
            id_ for (id_,) in self.all("SELECT id FROM attempt_error WHERE error LIKE 'the worker was lost%'")
        )

    # --- SQL ---------------------------------------------------------------------------------------

    def all(self, query: LiteralString, *params: Any) -> list[tuple[Any, ...]]:
        """All rows of a statement, or none where it gives no rows."""
        cursor = self.db.execute(query, params or None)
        return cursor.fetchall() if cursor.description is not None else []

    def value(self, query: LiteralString, *params: Any) -> Any:
        """The only value of a statement; None where it gives no row."""
        rows = self.all(query, *params)
        assert len(rows) <= 1
        return rows[0][0] if rows else None

    def consumer_id(self, *, pid: int | None = None, other_than: Iterable[int] = ()) -> int:
        """Waits for the only living registration but these."""
        query = "SELECT id FROM consumer WHERE dead_at IS NULL AND id <> ALL (%s) AND (%s::int IS NULL OR pid = %s)"
        id_: int = wait_until(lambda: self.value(query, list(other_than), pid, pid), message="a new registration")
        return id_

    def ids_of(self, pid: int) -> list[int]:
        """The registrations of a process, living or dead."""
        return [id_ for (id_,) in self.all("SELECT id FROM consumer WHERE pid = %s", pid)]

    def wait_until_leads(self, *, pid: int | None = None, id_: int | None = None) -> None:
        """Waits until a process, or a registration, holds the leader's lease."""
        query = (
            "SELECT 1 FROM leader l JOIN consumer c ON c.id = l.holder "
            "WHERE l.expires_at > clock_timestamp() AND (c.pid = %s OR c.id = %s)"
        )
        wait_until(lambda: self.value(query, pid, id_), message="its lease")

    def declare_dead(self, id_: int) -> None:
        """As a leader does to a consumer that was silent."""
        assert self.all("UPDATE consumer SET dead_at = clock_timestamp() WHERE id = %s RETURNING id", id_)

    def refuse(
        self,
        table: str,
        condition: LiteralString,
        *values: int,
        on: LiteralString = "INSERT",
        code: LiteralString = "P0001",
    ) -> None:
        """From now on no row that meets the condition gets into the table, or is changed so. Its trigger is called ``refuse``.

        ``code``: as for what is in the row (the default), or another SQLSTATE.
        """
        self.db.execute(
            sql.SQL(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN RAISE EXCEPTION 'no such row here' USING ERRCODE = {}; END$$"
            ).format(sql.Literal(code))
        )
        when = sql.SQL(condition).format(*map(sql.Literal, values))
        self.db.execute(
            sql.SQL("CREATE TRIGGER refuse BEFORE {} ON {} FOR EACH ROW WHEN ({}) EXECUTE FUNCTION refuse()").format(
                sql.SQL(on), sql.Identifier(table), when
            )
        )

    def claimed(self, id_: int) -> set[int]:
        """The tasks that a consumer holds."""
        rows = self.all(
            "SELECT i FROM claim, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i WHERE consumer = %s", id_
        )
        return {i for (i,) in rows}

    def wait_for_beat(self, id_: int, *, running: Iterable[int] = ()) -> None:
        """Waits until a heartbeat has named these tasks as running."""
        query = "SELECT (SELECT count(*) FROM unnest(%s::bigint[]) i WHERE running @> i) FROM consumer WHERE id = %s"
        ids = list(running)
        wait_until(lambda: self.value(query, ids, id_) == len(ids), message="a heartbeat with what runs")


def _stop(consumer: Consumer, handler: object) -> None:
    if isinstance(handler, Runs):
        handler.release.set()
    consumer.stop(5)
