"""The whole queue beside a plain model: producers, consumers that come, go and crash, all kinds of handlers, and a client, in random order.

After each step the queue is let settle: what consumers can run, they have run. Then each task must be where the model says.
`FASTQ_STATEFUL_STEPS` says how many steps at least, `FASTQ_STATEFUL_SEED` which; the seed is printed.
"""

from __future__ import annotations

import contextlib
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

from fastq import Consumer, InvalidTransition, Producer, SkipRetry, Snooze, Task, TaskInfo, TaskNotFound
from fastq.client import Client
from tests.support.consuming import new_consumer
from tests.support.lab import QUICK
from tests.support.waiting import wait_until

STEPS: Final = int(os.environ.get("FASTQ_STATEFUL_STEPS", "120"))
#: Steps of one example: as many tasks and consumers as come together in it.
_EXAMPLE: Final = 30
_LATER: Final = 3600.0
#: Handlers that wait: each takes a slot.
_MOST_HELD: Final = 6

#: What a handler does, as its task's payload says.
DOINGS: Final = ("return", "raise", "raise once", "snooze", "skip", "hold")


@dataclass
class Known:
    """What is known of a task."""

    does: str
    max_attempts: int
    state: str = "pending"
    attempts: int = 0
    later: bool = False

    def run(self) -> None:
        """What becomes of it once a consumer takes it."""
        match self.does:
            case "return":
                self.state, self.attempts = "completed", self.attempts + 1
            case "raise":
                self.state, self.attempts = "failed", self.max_attempts
            case "raise once" if self.attempts == 0 and self.max_attempts == 1:
                self.state, self.attempts = "failed", 1
            case "raise once":
                self.state, self.attempts = "completed", max(self.attempts, 1) + 1
            case "snooze":
                self.later = True
            case "skip":
                self.state, self.attempts = "failed", self.attempts + 1
            case "hold":
                self.state, self.attempts = "running", self.attempts + 1


class Queue(RuleBasedStateMachine):
    """Each rule does something to the queue and to the model."""

    dsn: ClassVar[str]
    schema: ClassVar[str]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.type = f"t{secrets.token_hex(4)}"
        self.tasks: dict[int, Known] = {}
        self.gone: list[int] = []
        self.tokens: dict[str, int] = {}
        self.consumers: list[Consumer] = []
        self.released = threading.Event()
        self.waiting: set[int] = set()
        self.held = 0
        self.producer = Producer(self.dsn, schema=self.schema)
        self.client = Client(self.dsn, schema=self.schema)

    def teardown(self) -> None:
        self.released.set()
        for consumer in self.consumers:
            consumer.stop(10)
        self.producer.close()
        self.client.close()

    # --- producers -------------------------------------------------------------------------------

    def task(self, does: str, max_attempts: int, *, later: bool, token: str | None = None) -> Task:
        if does == "hold":
            self.held += 1
            does = "hold" if self.held <= _MOST_HELD else "return"
        delay = _LATER if later else None
        return Task(self.type, does, max_attempts=max_attempts, delay=delay, idempotency_token=token)

    def note(self, id_: int, task: Task, *, later: bool) -> None:
        self.tasks[id_] = Known(cast("str", task.payload), task.max_attempts, later=later)

    @rule(does=st.sampled_from(DOINGS), max_attempts=st.integers(1, 3), later=st.booleans())
    def enqueue(self, does: str, max_attempts: int, *, later: bool) -> None:
        task = self.task(does, max_attempts, later=later)
        self.note(self.producer.enqueue(task).id, task, later=later)

    @rule(kinds=st.lists(st.tuples(st.sampled_from(DOINGS[:-1]), st.booleans()), min_size=1, max_size=40))
    def enqueue_many(self, kinds: list[tuple[str, bool]]) -> None:
        tasks = [self.task(does, 2, later=later) for does, later in kinds]
        for found, task, (_, later) in zip(self.producer.enqueue_many(tasks), tasks, kinds, strict=True):
            self.note(found.id, task, later=later)

    @rule(token=st.sampled_from("abc"), does=st.sampled_from(DOINGS[:-1]))
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
    @rule()
    def start_consumer(self) -> None:
        released, waiting = self.released, self.waiting
        consumer = new_consumer(self.dsn, self.schema, **QUICK, concurrency=2 * _MOST_HELD)

        def handle(task: TaskInfo) -> None:
            match task.payload:
                case "raise":
                    raise ValueError("no")
                case "raise once" if task.attempt == 1:
                    raise ValueError("not yet")
                case "snooze":
                    raise Snooze(_LATER)
                case "skip":
                    raise SkipRetry("never")
                case "hold":
                    waiting.add(task.id)
                    assert released.wait(60)

        consumer.handler(self.type)(handle)
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
                task.state = "completed"
        self.settle()
        for consumer in self.consumers:
            consumer.stop(20)
        self.consumers.clear()
        self.released = threading.Event()

    @precondition(lambda self: self.consumers)
    @rule()
    def crash(self) -> None:
        """Their connections end, and they are given up with all that they hold; what ran may be charged or not. A new one comes."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND application_name IN ('fastq claim', 'fastq complete', 'fastq control')"
            )
        ran = {id_: task for id_, task in self.tasks.items() if task.state == "running"}
        for consumer in self.consumers:
            consumer.stop(0)
        self.consumers.clear()
        self.released.set()
        self.released, self.waiting = threading.Event(), set()
        self.start_consumer()

        def settled() -> bool:
            # Charged, it runs again as the next attempt, or has failed; uncharged, as the same one.
            found = {id_: self.client.get_task(id_).state for id_ in ran}
            return all(state == "failed" or id_ in self.waiting for id_, state in found.items())

        wait_until(settled, message="what ran to be rescued")
        for id_, task in ran.items():
            record = self.client.get_task(id_)
            assert record.state in ("running", "failed"), "its handler never returned"
            assert task.attempts <= record.attempts <= task.attempts + 1
            assert record.state == "running" or record.attempts == task.max_attempts
            task.state, task.attempts = record.state, record.attempts

    # --- clients ---------------------------------------------------------------------------------

    def pick(self, data: Any) -> int | None:
        ids = [*self.tasks, *self.gone[-3:]]
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
            del self.tasks[id_]
            self.gone.append(id_)
            self.tokens = {token: other for token, other in self.tokens.items() if other != id_}

    @rule(data=st.data(), does=st.sampled_from(DOINGS[:-1]), delay=st.sampled_from([None, 0.0, _LATER]))
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
                if task.state == "pending" and not task.later:
                    task.run()
        wanted = {id_: (task.state, task.attempts, task.does, True) for id_, task in self.tasks.items()}
        seen: dict[int, tuple[str, int, Any, bool]] = {}

        def is_settled() -> bool:
            seen.clear()
            page = self.client.list_tasks(types=[self.type], limit=10_000)
            assert page.next is None
            for task in page:
                # One that a handler snoozes looks as before, but for its time.
                has_time = task.kind == "scheduled" or task.id not in wanted or not self.tasks[task.id].later
                seen[task.id] = (task.state, task.attempts, task.payload, has_time)
            return seen == wanted

        with contextlib.suppress(AssertionError):
            wait_until(is_settled, timeout=20)
        assert {id_: seen.get(id_) for id_ in wanted if seen.get(id_) != wanted[id_]} == {}
        assert set(seen) == set(wanted)


@pytest.mark.timeout(60 + STEPS)
def test_the_queue_agrees_with_a_model(dsn: str, migrated: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = int(os.environ.get("FASTQ_STATEFUL_SEED") or secrets.randbits(32))
    with capsys.disabled():
        print(f"\nstateful test: at least {STEPS} steps, FASTQ_STATEFUL_SEED={number}")  # noqa: T201 to repeat it
    Queue.dsn, Queue.schema, Queue.steps = dsn, migrated, 0
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
