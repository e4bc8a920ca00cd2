"""Handlers that do what the test says, step by step, on the thread on which their consumer called them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastq import Consumer, TaskInfo

T = TypeVar("T")

#: Seconds that a step may take: what nobody ends shows as an error, not as a hang.
LIMIT = 30.0


class Run:
    """A handler at work."""

    def __init__(self, task: TaskInfo) -> None:
        self.task = task
        self._orders: queue.Queue[Callable[[], bool]] = queue.Queue()

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Runs a call on the handler's thread."""
        future: Future[T] = Future()

        def order() -> bool:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 the test's to look at
                future.set_exception(error)
            return True

        self._orders.put(order)
        return future

    def do(self, call: Callable[[], T]) -> T:
        return self.start(call).result(LIMIT)

    def end(self, error: BaseException | None = None) -> None:
        """Lets the handler return, or raise this."""

        def order() -> bool:
            if error is not None:
                raise error
            return False

        self._orders.put(order)

    def obey(self) -> None:
        """The handler itself."""
        while self._orders.get(timeout=2 * LIMIT)():
            pass


class Puppet:
    """A sync handler whose runs the test leads.

    Args:
        consumer: gets it as the handler of a type.
        type_: this one.
        options: of `add_handler`.
    """

    def __init__(self, consumer: Consumer, type_: str = "t", **options: Any) -> None:
        self.consumer = consumer
        consumer.add_handler(type_, self, **options)
        self._runs: queue.Queue[Run] = queue.Queue()
        self._is_free = False
        self.runs: list[Run] = []

    def __call__(self, task: TaskInfo) -> Any:
        run = Run(task)
        self.runs.append(run)
        self._runs.put(run)
        if not self._is_free:
            run.obey()

    def next(self) -> Run:
        """The next run that was begun."""
        return self._runs.get(timeout=LIMIT)

    def free(self) -> None:
        """From now on further runs return at once."""
        self._is_free = True

    def stop(self, timeout: float = 10) -> None:
        """Lets all handlers return (those that have ended hear nothing of it), and stops the consumer if it runs."""
        for run in self.runs:
            run.end()
        if self.consumer._running is not None:
            self.consumer.stop(timeout)
