"""The whole queue beside a plain model: producers, consumers that come, go and crash, all kinds of handlers, and a client, in random order.

After each step the queue is let settle: what consumers can run, they have run. Then each task must be where the model says, and what
handlers wrote in the transactions that completed their tasks must be there once.
`FASTQ_STATEFUL_STEPS` says how many steps at least, `FASTQ_STATEFUL_SEED` which; the seed is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import secrets
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fastq import (
    ConstantBackoff,
    Consumer,
    InvalidTransition,
    Producer,
    SkipRetry,
    Snooze,
    Task,
    TaskInfo,
    TaskNotFound,
    _engine,
)
from fastq.client import Client
from tests.support.consuming import new_consumer
from tests.support.lab import QUICK
from tests.support.producing import Background
from tests.support.waiting import wait_until

STEPS: Final = int(os.environ.get("FASTQ_STATEFUL_STEPS", "120"))
#: Steps of one example: as many tasks and consumers as come together in it.
_EXAMPLE: Final = 30
_LATER: Final = 3600.0
#: Handlers that wait: each takes a slot.
_MOST_HELD: Final = 6

#: What a handler does, as its task's payload says; in these it ends by itself.
FREE: Final = (
    "return",
    "raise",
    "raise once",
    "snooze",
    "skip",
    "complete",
    "complete and raise",
    "roll back",
    "roll back once",
)
#: In these it waits: with its transaction open, which has completed the task when it commits, or without one.
_OPEN: Final = "hold a transaction"
HOLDS: Final = ("hold", _OPEN)
#: Those that complete their task in a transaction, and write into it.
_WRITERS: Final = ("complete", "complete and raise", "roll back once", _OPEN)
#: A task's own policy: seconds until its retry; None: the consumer's, at once.
RETRIES: Final = (None, 0.0, _LATER)

#: The application_name of handlers' own connections.
_HANDLER: Final = "handler"
_OF_THE_ENGINE: Final = ["fastq claim", "fastq complete", "fastq control"]
_WAITS_FOR_A_HANDLER: Final = """
    SELECT EXISTS (SELECT FROM pg_stat_activity w, unnest(pg_blocking_pids(w.pid)) b JOIN pg_stat_activity h ON h.pid = b
                    WHERE h.application_name = %s AND h.datname = current_database())
"""


@dataclass
class Known:
    """What is known of a task."""

    does: str
    max_attempts: int
    retry: float | None = None
    state: str = "pending"
    attempts: int = 0
    later: bool = False
    effects: int = 0

    def run(self) -> None:
        """What becomes of it when a consumer takes it, once."""
        match self.does:
            case "raise" | "roll back":
                self.fail()
            case "raise once" | "roll back once" if self.attempts == 0:
                self.fail()
            case "snooze":
                self.later = True
            case "skip":
                self.state, self.attempts = "failed", self.attempts + 1
            case "hold" | "hold a transaction":
                self.state, self.attempts = "running", self.attempts + 1
            case _:
                self.attempts += 1
                self.complete()

    def complete(self) -> None:
        """An attempt has completed it."""
        self.state = "completed"
        self.effects += self.does in _WRITERS

    def fail(self) -> None:
        """An attempt has failed."""
        self.attempts += 1
        if self.attempts >= self.max_attempts:
            self.state = "failed"
        else:
            self.later = self.retry == _LATER


class Handler:
    """What a consumer's handler does, sync or async. Those that wait do so at this gate, and are then among ``waiting``.

    A consumer that is given up cancels its coroutines: those are among ``cancellable``, too.
    """

    def __init__(
        self, dsn: str, schema: str, released: threading.Event, waiting: set[int], cancellable: set[int]
    ) -> None:
        self._dsn = dsn
        self._write = _engine.render("INSERT INTO fastq.effect VALUES (%s)", schema).encode()
        self._released = released
        self._waiting = waiting
        self._cancellable = cancellable

    def run(self, task: TaskInfo) -> None:
        """The sync one."""
        if self._begin(task):
            with psycopg.connect(self._dsn, application_name=_HANDLER) as connection:  # commits at its end
                connection.execute(self._write, (task.id,))
                task.complete_tx(connection)
                if self._rolls_back(task):
                    connection.rollback()
                elif task.payload == _OPEN:
                    self._wait(task)
            self._end(task)
        elif task.payload == "hold":
            self._wait(task)

    async def arun(self, task: TaskInfo) -> None:
        """The async one."""
        if self._begin(task):
            async with await psycopg.AsyncConnection.connect(self._dsn, application_name=_HANDLER) as connection:
                await connection.execute(self._write, (task.id,))
                await task.acomplete_tx(connection)
                if self._rolls_back(task):
                    await connection.rollback()
                elif task.payload == _OPEN:
                    await self._await(task)
            self._end(task)
        elif task.payload == "hold":
            await self._await(task)

    @staticmethod
    def _begin(task: TaskInfo) -> bool:
        """Whether it goes on in a transaction."""
        match task.payload:
            case "raise":
                raise ValueError("no")
            case "raise once" if task.attempt == 1:
                raise ValueError("not yet")
            case "snooze":
                raise Snooze(_LATER)
            case "skip":
                raise SkipRetry("never")
        return task.payload in (*_WRITERS, "roll back")

    @staticmethod
    def _rolls_back(task: TaskInfo) -> bool:
        return task.payload == "roll back" or (task.payload == "roll back once" and task.attempt == 1)

    @staticmethod
    def _end(task: TaskInfo) -> None:
        if task.payload == "complete and raise":
            raise ValueError("too late")

    def _wait(self, task: TaskInfo) -> None:
        self._waiting.add(task.id)
        assert self._released.wait(60)

    async def _await(self, task: TaskInfo) -> None:
        self._cancellable.add(task.id)
        self._waiting.add(task.id)
        async with asyncio.timeout(60):
            # Set by another thread. None waits for it here: that would outlive what was cancelled.
            while not self._released.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


class Queue(RuleBasedStateMachine):
    """Each rule does something to the queue and to the model."""

    dsn: ClassVar[str]
    schema: ClassVar[str]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.type = f"t{secrets.token_hex(4)}"
        self.tasks: dict[int, Known] = {}
        self.gone: dict[int, Known] = {}
        self.tokens: dict[str, int] = {}
        self.consumers: list[Consumer] = []
        self.released = threading.Event()
        self.waiting: set[int] = set()
        self.cancellable: set[int] = set()
        self.held = 0
        self.producer = Producer(self.dsn, schema=self.schema)
        self.client = Client(self.dsn, schema=self.schema)
        self.db = psycopg.connect(self.dsn, autocommit=True)

    def teardown(self) -> None:
        self.released.set()
        for consumer in self.consumers:
            consumer.stop(10)
        self.producer.close()
        self.client.close()
        self.db.close()

    def sql(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """The rows of a statement."""
        return self.db.execute(_engine.render(statement, self.schema).encode(), params).fetchall()

    # --- producers -------------------------------------------------------------------------------

    def task(
        self, does: str, max_attempts: int, *, later: bool, retry: float | None = None, token: str | None = None
    ) -> Task:
        if does in HOLDS:
            self.held += 1
            does = does if self.held <= _MOST_HELD else "return"
        delay = _LATER if later else None
        policy = None if retry is None else ConstantBackoff(retry)
        return Task(self.type, does, max_attempts=max_attempts, delay=delay, idempotency_token=token, retry=policy)

    def note(self, id_: int, task: Task, *, later: bool, retry: float | None = None) -> None:
        self.tasks[id_] = Known(cast("str", task.payload), task.max_attempts, retry, later=later)

    @rule(
        does=st.sampled_from(FREE + HOLDS),
        max_attempts=st.integers(1, 3),
        later=st.booleans(),
        retry=st.sampled_from(RETRIES),
    )
    def enqueue(self, does: str, max_attempts: int, *, later: bool, retry: float | None) -> None:
        task = self.task(does, max_attempts, later=later, retry=retry)
        self.note(self.producer.enqueue(task).id, task, later=later, retry=retry)

    @rule(does=st.sampled_from(HOLDS), max_attempts=st.integers(1, 3))
    def enqueue_one_that_waits(self, does: str, max_attempts: int) -> None:
        """Among all the others they would be few, and a crash would seldom meet one."""
        self.enqueue(does, max_attempts, later=False, retry=None)

    @rule(
        kinds=st.lists(
            st.tuples(st.sampled_from(FREE), st.booleans(), st.sampled_from(RETRIES)), min_size=1, max_size=40
        )
    )
    def enqueue_many(self, kinds: list[tuple[str, bool, float | None]]) -> None:
        tasks = [self.task(does, 2, later=later, retry=retry) for does, later, retry in kinds]
        for found, task, (_, later, retry) in zip(self.producer.enqueue_many(tasks), tasks, kinds, strict=True):
            self.note(found.id, task, later=later, retry=retry)

    @rule(token=st.sampled_from("abc"), does=st.sampled_from(FREE))
    def enqueue_with_a_token(self, token: str, does: str) -> None:
        token = f"{self.type} {token}"
        task = self.task(does, 2, later=False, token=token)
        found = self.producer.enqueue(task)
        assert found.is_new == (token not in self.tokens)
        if found.is_new:
            self.tokens[token] = found.id
            self.note(found.id, task, later=False)
        assert found.id == self.tokens[token]

    # --- consumers -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.consumers) < 2)
    @rule(is_async=st.booleans())
    def start_consumer(self, *, is_async: bool) -> None:
        consumer = new_consumer(self.dsn, self.schema, **QUICK, concurrency=2 * _MOST_HELD)
        handler = Handler(self.dsn, self.schema, self.released, self.waiting, self.cancellable)
        consumer.handler(self.type)(handler.arun if is_async else handler.run)
        consumer.start()
        self.consumers.append(consumer)

    def holds(self) -> bool:
        return any(task.state == "running" for task in self.tasks.values())

    @precondition(lambda self: self.consumers and not self.holds())
    @rule()
    def stop_consumer(self) -> None:
        self.consumers.pop(0).stop(20)

    @precondition(lambda self: self.holds())
    @rule()
    def release(self) -> None:
        """All handlers that wait return. Nobody else waits at this gate: consumers that come later have another."""
        self.released.set()
        for task in self.tasks.values():
            if task.state == "running":
                task.complete()
        self.settle()
        for consumer in self.consumers:
            consumer.stop(20)
        self.consumers.clear()
        self.released = threading.Event()

    @precondition(lambda self: self.consumers)
    @rule(whole=st.booleans(), is_async=st.booleans())
    def crash(self, *, whole: bool, is_async: bool) -> None:
        """Their connections end, and they are given up with all that they hold; what ran may be charged or not. A new one comes.

        ``whole``: their handlers' connections end, too. Else handlers that have completed their tasks commit that when all is over; but
        coroutines are cancelled, which rolls back.
        """
        names = [*_OF_THE_ENGINE, *([_HANDLER] if whole else [])]
        self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = ANY (%s)",
            names,
        )
        ran = {id_: task for id_, task in self.tasks.items() if task.state == "running"}
        for consumer in self.consumers:
            consumer.stop(0)
        self.consumers.clear()
        self.released.set()
        cancelled = self.cancellable
        self.released, self.waiting, self.cancellable = threading.Event(), set(), set()
        if not whole:
            for id_ in [id_ for id_, task in ran.items() if task.does == _OPEN and id_ not in cancelled]:
                ran.pop(id_).complete()
        # This time they do not wait: of what was lost before, some run one by one, while nothing else does (ADR 3).
        self.released.set()
        self.start_consumer(is_async=is_async)

        def settled() -> bool:
            return all(self.client.get_task(id_).state in ("completed", "failed") for id_ in ran)

        wait_until(settled, message="what ran to be rescued, and to end")
        self.released.clear()
        for id_, task in ran.items():
            # Charged, it ran again as the next attempt, or had none left; uncharged, as the same one.
            record = self.client.get_task(id_)
            assert task.attempts <= record.attempts <= task.attempts + 1
            if record.state == "completed":
                task.complete()
            else:
                assert record.attempts == task.max_attempts, "its handler never raised"
                task.state = "failed"
            task.attempts = record.attempts

    # --- clients ---------------------------------------------------------------------------------

    def pick(self, data: Any) -> int | None:
        ids = [*self.tasks, *list(self.gone)[-3:]]
        return data.draw(st.sampled_from(ids)) if ids else None

    def act(self, call: Any, id_: int, *, may: bool) -> bool:
        """Whether it was done; fails where it should have been and was not, or the other way."""
        if may:
            call()
            return True
        with pytest.raises(InvalidTransition if id_ in self.tasks else TaskNotFound):
            call()
        return False

    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        if (id_ := self.pick(data)) is None:
            return
        task = self.tasks.get(id_)
        if task is not None and (task.state, task.does) == ("running", _OPEN):
            # It waits for the handler's transaction, and comes too late.
            late = Background(lambda: self.client.cancel_task(id_))
            wait_until(lambda: self.sql(_WAITS_FOR_A_HANDLER, _HANDLER) == [(True,)], message="the cancel to wait")
            self.release()
            with pytest.raises(InvalidTransition):
                late.result()
            return
        may = task is not None and task.state != "completed"
        if self.act(lambda: self.client.cancel_task(id_), id_, may=may) and task is not None:
            task.state, task.later = "cancelled", False

    @rule(data=st.data())
    def retry(self, data: Any) -> None:
        if (id_ := self.pick(data)) is None:
            return
        task = self.tasks.get(id_)
        may = task is not None and task.state in ("failed", "cancelled")
        if self.act(lambda: self.client.retry_task(id_), id_, may=may) and task is not None:
            task.state, task.max_attempts = "pending", max(task.max_attempts, task.attempts + 1)

    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        if (id_ := self.pick(data)) is None:
            return
        may = id_ in self.tasks and self.tasks[id_].state != "running"
        if self.act(lambda: self.client.delete_task(id_), id_, may=may):
            self.gone[id_] = self.tasks.pop(id_)
            self.tokens = {token: other for token, other in self.tokens.items() if other != id_}

    @rule(data=st.data(), does=st.sampled_from(FREE), delay=st.sampled_from([None, 0.0, _LATER]))
    def edit(self, data: Any, does: str, delay: float | None) -> None:
        if (id_ := self.pick(data)) is None:
            return
        task = self.tasks.get(id_)
        may = task is not None and task.state == "pending"
        change: dict[str, Any] = {"payload": does} if delay is None else {"payload": does, "delay": delay}
        if self.act(lambda: self.client.edit_task(id_, **change), id_, may=may) and task is not None:
            task.does = does
            task.later = task.later if delay is None else delay > 0

    @rule(states=st.sampled_from([["failed"], ["cancelled"], ["failed", "cancelled"]]))
    def retry_many(self, states: list[str]) -> None:
        chosen = [task for task in self.tasks.values() if task.state in states]
        assert self.client.retry_tasks(types=[self.type], states=cast("Any", states)) == len(chosen)
        for task in chosen:
            task.state, task.max_attempts = "pending", max(task.max_attempts, task.attempts + 1)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def settle(self) -> None:
        """Each task is where the model says, once consumers have run what they can."""
        type(self).steps += 1
        if self.consumers:
            for task in self.tasks.values():
                while task.state == "pending" and not task.later:
                    task.run()
        wanted = {
            id_: (task.state, task.attempts, task.does, task.state == "pending" and task.later)
            for id_, task in self.tasks.items()
        }
        seen: dict[int, tuple[str, int, Any, bool]] = {}

        def is_settled() -> bool:
            seen.clear()
            page = self.client.list_tasks(types=[self.type], limit=10_000)
            assert page.next is None
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=_LATER / 2)
            for task in page:
                # One that waits for later looks as before it ran, but for its time.
                is_later = task.state == "pending" and task.run_at is not None and task.run_at > soon
                seen[task.id] = (task.state, task.attempts, task.payload, is_later)
            # A task runs from its claim on: what others do to it next shall meet its handler where it waits.
            return seen == wanted and self.waiting >= {id_ for id_, known in wanted.items() if known[0] == "running"}

        with contextlib.suppress(AssertionError):
            wait_until(is_settled)
        assert {id_: seen.get(id_) for id_ in wanted if seen.get(id_) != wanted[id_]} == {}
        assert set(seen) == set(wanted)
        known = self.tasks | self.gone
        effects = dict(self.sql("SELECT id, count(*) FROM fastq.effect WHERE id = ANY (%s) GROUP BY id", list(known)))
        assert effects == {id_: task.effects for id_, task in known.items() if task.effects}


@pytest.mark.timeout(60 + STEPS)
def test_the_queue_agrees_with_a_model(dsn: str, migrated: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = int(os.environ.get("FASTQ_STATEFUL_SEED") or secrets.randbits(32))
    with capsys.disabled():
        print(f"\nstateful test: at least {STEPS} steps, FASTQ_STATEFUL_SEED={number}")  # noqa: T201 to repeat it
    Queue.dsn, Queue.schema, Queue.steps = dsn, migrated, 0
    with psycopg.connect(dsn) as connection:
        connection.execute(_engine.render("CREATE TABLE fastq.effect (id bigint NOT NULL)", migrated).encode())
    how = settings(
        max_examples=5,
        stateful_step_count=_EXAMPLE,
        deadline=None,
        database=None,
        # A step takes its time: the steps that failed are shown as they are, not shrunk.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    while Queue.steps < STEPS:

        def machine() -> Queue:
            return Queue()

        run_state_machine_as_test(cast("Any", seed(number)(machine)), settings=how)
        number += 1
