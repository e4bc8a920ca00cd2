"""Handlers that note each start and do nothing else, or sleep; and the same in a bare loop with no queue."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal, TypeAlias, cast

from fastq._engine import TaskInfo
from fastq.bench._loops import run_coroutine

Kind: TypeAlias = Literal["sync", "async"]
Handler: TypeAlias = Callable[[TaskInfo], object]

#: Seconds of the bare loop before the queue's turn, and as many after it: the machine's speed may drift.
_BARE_SECONDS: Final = 3.0


class Starts:
    """The ids of the tasks whose handlers were started, 8 bytes each: as often as they were started."""

    def __init__(self) -> None:
        self.ids = array("q")

    def handler(self, kind: Kind, work: float = 0.0) -> Handler:
        """A handler that notes the start and sleeps for ``work`` seconds.

        An append to an array is one step under the interpreter's lock: no start is lost between threads.
        """
        note = self.ids.append
        if kind == "async":
            if work:

                async def sleep_async(task: TaskInfo) -> None:
                    note(task.id)
                    await asyncio.sleep(work)

                return sleep_async

            async def note_async(task: TaskInfo) -> None:
                note(task.id)

            return note_async
        if work:

            def sleep(task: TaskInfo) -> None:
                note(task.id)
                time.sleep(work)

            return sleep

        def note_only(task: TaskInfo) -> None:
            note(task.id)

        return note_only


class _BareTask:
    """What a handler asks a task for."""

    id = 0


def bare_loop(kind: Kind, work: float, concurrency: int) -> tuple[int, float]:
    """Run such a handler in as many threads or coroutines, with no queue. Returns how often it ran, and in how many seconds."""
    handler = Starts().handler(kind, work)
    task = cast("TaskInfo", _BareTask())
    if kind == "async":
        return run_coroutine(lambda: _bare_coroutines(handler, task, concurrency))
    return _bare_threads(handler, task, concurrency)


def _bare_threads(handler: Handler, task: TaskInfo, concurrency: int) -> tuple[int, float]:
    counts: list[int] = []
    ready = threading.Barrier(concurrency + 1)

    def work() -> None:
        count = 0
        ready.wait()
        until = time.perf_counter() + _BARE_SECONDS
        while time.perf_counter() < until:
            handler(task)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts), time.perf_counter() - began


async def _bare_coroutines(handler: Handler, task: TaskInfo, concurrency: int) -> tuple[int, float]:
    began = time.perf_counter()
    until = began + _BARE_SECONDS
    run = cast("Callable[[TaskInfo], Coroutine[Any, Any, None]]", handler)

    async def work() -> int:
        count = 0
        while time.perf_counter() < until:
            await run(task)
            count += 1
        return count

    counts = await asyncio.gather(*(work() for _ in range(concurrency)))
    return sum(counts), time.perf_counter() - began


__all__ = ["Handler", "Kind", "Starts", "bare_loop"]
