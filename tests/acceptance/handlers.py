"""Handlers at work, sync and async, that do what their case says with a transaction of their own, and the cases that they make."""

from __future__ import annotations

import asyncio
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, Literal, Self, TypeAlias

import psycopg

from fastq import CompletionError, ConstantBackoff, Snooze, TaskInfo, TaskLost, _engine
from tests.acceptance.stage import Case, Kind, Stage
from tests.acceptance.table import RESULTS, Action, HandlerEnd, Place, TransactionEnd
from tests.support.consuming import new_consumer
from tests.support.puppets import LIMIT
from tests.support.storage import Session, Worker
from tests.support.waiting import wait_until

#: "part": a call that is refused (the connection is in autocommit) when the engine has given the task a claim of its own.
Step: TypeAlias = Literal["part", "write", "complete", "commit", "rollback", "close"]

_RAISED: Final[dict[HandlerEnd, BaseException | None]] = {
    "returns": None,
    "raises": ValueError("no"),
    "snoozes": Snooze(60),
}

#: What handlers write, and what holds a COMMIT up, or makes a rollback of it.
_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS fastq.effect (id bigint NOT NULL)",
    "CREATE TABLE IF NOT EXISTS fastq.refused (id bigint NOT NULL)",
    """CREATE OR REPLACE FUNCTION fastq.look_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
           PERFORM pg_advisory_xact_lock(TG_RELID::integer, NEW.id::integer);
           IF EXISTS (SELECT FROM fastq.refused WHERE id = NEW.id) THEN RAISE EXCEPTION 'no commit'; END IF;
           RETURN NULL;
       END$$""",
    "DROP TRIGGER IF EXISTS look_at_commit ON fastq.effect",
    """CREATE CONSTRAINT TRIGGER look_at_commit AFTER INSERT ON fastq.effect DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION fastq.look_at_commit()""",
)
_WRITE: Final = "INSERT INTO fastq.effect VALUES (%s)"


class Run(ABC):
    """A handler at work: it does its steps itself, one after the other. When it has ended they are done for it."""

    def __init__(self, task: TaskInfo, pid: int) -> None:
        self.task = task
        self.pid = pid
        """The server process of its connection."""
        self._has_ended = False

    def do(self, step: Step) -> None:
        """Does a step; raises what it raises."""
        self.start(step).result(LIMIT)

    def end(self, how: HandlerEnd = "returns") -> None:
        """Lets the handler end, if it has not. Its connection stays as it is."""
        if not self._has_ended:
            self._has_ended = True
            self._order(_RAISED[how])

    @abstractmethod
    def start(self, step: Step) -> Future[None]:
        """Begins a step."""

    @abstractmethod
    def _order(self, error: BaseException | None) -> None:
        """Has the handler return, or raise this."""


def _carry_out(call: Callable[[], object], future: Future[None]) -> None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 the case's to look at
        future.set_exception(error)
    else:
        future.set_result(None)


class SyncRun(Run):
    """On a handler's thread, with psycopg's `Connection`."""

    def __init__(self, task: TaskInfo, connection: psycopg.Connection, write: str) -> None:
        super().__init__(task, connection.info.backend_pid)

        def part() -> None:
            connection.autocommit = True
            try:
                task.complete_tx(connection)
            except CompletionError:
                connection.autocommit = False

        self._steps: dict[Step, Callable[[], object]] = {
            "part": part,
            "write": lambda: connection.execute(write.encode(), (task.id,)),
            "complete": lambda: task.complete_tx(connection),
            "commit": connection.commit,
            "rollback": connection.rollback,
            "close": connection.close,
        }
        self._orders: queue.Queue[tuple[Step, Future[None]] | BaseException | None] = queue.Queue()

    def start(self, step: Step) -> Future[None]:
        future: Future[None] = Future()
        if self._has_ended:
            _carry_out(self._steps[step], future)
        else:
            self._orders.put((step, future))
        return future

    def _order(self, error: BaseException | None) -> None:
        self._orders.put(error)

    def obey(self) -> None:
        """The handler."""
        while isinstance(order := self._orders.get(timeout=2 * LIMIT), tuple):
            step, future = order
            _carry_out(self._steps[step], future)
        if order is not None:
            raise order


class AsyncRun(Run):
    """A coroutine, with psycopg's `AsyncConnection`. Cancelled where it waits for its case, it goes on all the same."""

    def __init__(self, task: TaskInfo, connection: psycopg.AsyncConnection, write: str) -> None:
        super().__init__(task, connection.info.backend_pid)
        self._loop = asyncio.get_running_loop()

        async def part() -> None:
            await connection.set_autocommit(True)
            try:
                await task.acomplete_tx(connection)
            except CompletionError:
                await connection.set_autocommit(False)

        self._steps: dict[Step, Callable[[], Coroutine[Any, Any, object]]] = {
            "part": part,
            "write": lambda: connection.execute(write.encode(), (task.id,)),
            "complete": lambda: task.acomplete_tx(connection),
            "commit": connection.commit,
            "rollback": connection.rollback,
            "close": connection.close,
        }
        self._orders: asyncio.Queue[tuple[Step, Future[None]] | BaseException | None] = asyncio.Queue()

    def start(self, step: Step) -> Future[None]:
        future: Future[None] = Future()
        if self._has_ended:
            asyncio.run_coroutine_threadsafe(self._carry_out(step, future), self._loop)
        else:
            self._loop.call_soon_threadsafe(self._orders.put_nowait, (step, future))
        return future

    def _order(self, error: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._orders.put_nowait, error)

    async def _carry_out(self, step: Step, future: Future[None]) -> None:
        try:
            await self._steps[step]()
        except BaseException as error:  # noqa: BLE001 the case's to look at
            future.set_exception(error)
        else:
            future.set_result(None)

    async def obey(self) -> None:
        """The handler."""
        while True:
            try:
                order = await self._orders.get()
            except asyncio.CancelledError:
                continue
            if not isinstance(order, tuple):
                break
            await self._carry_out(*order)
        if order is not None:
            raise order


def _handler(kind: Kind, dsn: str, write: str, put: Callable[[Run], None]) -> Callable[[TaskInfo], Any]:
    def handle(task: TaskInfo) -> None:
        run = SyncRun(task, psycopg.connect(dsn), write)
        put(run)
        run.obey()

    async def handle_async(task: TaskInfo) -> None:
        run = AsyncRun(task, await psycopg.AsyncConnection.connect(dsn), write)
        put(run)
        await run.obey()

    return handle if kind == "sync" else handle_async


class Handled(Case):
    """A task that a consumer of the case's own runs, and two beside it in the same claim. Nothing reaches that consumer by itself:
    it neither beats nor claims again while its handlers are at work, and learns what became of its tasks when it asks."""

    run: Run
    """Of the task itself."""

    def _bring(self, place: Place) -> Worker:
        assert place == "running"
        stage = self.stage
        for statement in _TABLES:
            stage.observer.sql(statement)
        self.consumer = new_consumer(
            stage.dsn,
            stage.schema,
            concurrency=len(self.ids),
            retry_policy=ConstantBackoff(60),
            listen=False,
            upkeep=False,
            poll_interval=60,
            heartbeat_interval=60,
            lease=120,
            dead_after=300,
        )
        runs: queue.Queue[Run] = queue.Queue()
        self._runs: dict[int, Run] = {}
        write = _engine.render(_WRITE, stage.schema)
        self.consumer.add_handler(self.type, _handler(stage.kind, stage.dsn, write, runs.put))
        self.consumer.start()
        self._is_closed = False
        try:
            while len(self._runs) < len(self.ids):
                run = runs.get(timeout=LIMIT)
                self._runs[run.task.id] = run
        except queue.Empty:
            self.close()
            raise
        self.run = self._runs[self.id]
        [(me, _)] = set(stage.observer.sql("SELECT consumer, no FROM fastq.claim WHERE ids && $1", self._range()))
        return Worker(stage.observer, me, register=False)

    def _range(self) -> str:
        return f"{{[{self.ids[0]},{self.ids[-1] + 1})}}"

    # --- the others --------------------------------------------------------------------------------

    def prepare(self, action: Action) -> None:
        if action == "rescue":
            # It would claim again what is rescued, as soon as a handler ends.
            self.consumer._started().engine.stop()
        super().prepare(action)

    def _claim(self, other: Worker) -> list[int]:
        # From here on it is that worker whose results come.
        chunks = other.claim(3, [self.lane])
        if chunks:
            self._taker, self.held = other.id, {}
        for chunk in chunks:
            # Several chunks may be one claim.
            self.held.setdefault(chunk.no, []).extend(chunk.ids or [])
        return [id_ for chunk in chunks for id_ in chunk.ids or []]

    def _result(self, action: Action, worker: Worker) -> str:
        assert action in RESULTS
        return super()._result(action, Worker(worker.session, self._taker, register=False))

    # --- the handler -------------------------------------------------------------------------------

    def complete(self) -> str:
        """The handler writes, and completes its task. What it is told."""
        self.run.do("write")
        return self.told(self.run.start("complete"))

    def told(self, completing: Future[None]) -> str:
        """What the handler is told by a call to complete its task. Of a cancel a coroutine may hear in the midst of it."""
        try:
            completing.result(LIMIT)
        except (TaskLost, asyncio.CancelledError):
            return "refused"
        return "done"

    def end_transaction(self, end: TransactionEnd) -> None:
        """It has ended when this returns."""
        observer = self.stage.observer
        if end == "lost":
            observer.sql("SELECT pg_terminate_backend($1::integer)", self.run.pid)
            query = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1::integer)"
            wait_until(lambda: not observer.value(query, self.run.pid), message="the connection's end")
        else:
            self.run.do("commit" if end == "committed" else "rollback")

    def wait_until_handlers_ended(self, count: int) -> None:
        """Waits until so many still run."""
        engine = self.consumer._started().engine
        wait_until(lambda: engine.running == count, message=f"{count} handlers to be left")

    def hold_commit(self, session: Session, *, may: bool) -> None:
        """From here on the handler's COMMIT waits for `release_commit`, and is refused then unless it may be."""
        if not may:
            session.sql("INSERT INTO fastq.refused VALUES ($1)", self.id)
        session.sql("SELECT pg_advisory_lock('fastq.effect'::regclass::oid::integer, $1::integer)", self.id)

    def release_commit(self, session: Session) -> None:
        session.sql("SELECT pg_advisory_unlock('fastq.effect'::regclass::oid::integer, $1::integer)", self.id)

    def effects(self) -> int:
        """How often there is what the handler wrote."""
        return int(self.stage.observer.value("SELECT count(*) FROM fastq.effect WHERE id = $1", self.id))

    # --- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """All handlers and the consumer have ended, and what they left is decided. Done once."""
        if self._is_closed:
            return
        self._is_closed = True
        # As long as one is at work there is a loop.
        for run in self._runs.values():
            run.do("close")
        for run in self._runs.values():
            run.end()
        self.consumer.stop(LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def handled(stage: Stage) -> Handled:
    """A new task whose handler is at work."""
    return Handled(stage, "running")
