"""Waiting for results: looks with growing pauses, each for all tasks of a client that are waited for and nearly due.

A notification for each completion would cost the server more than a look now and then, and a client a connection that listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from fastq._records import TaskRecord
from fastq.errors import ResultNotKept, TaskError, TaskFailed

#: Seconds between the first two looks.
SOON: Final = 0.02
#: Seconds between two looks, at most, unless the caller says otherwise.
POLL_INTERVAL: Final = 1.0
# So a look comes late by a tenth of the time waited so far, on average.
_GROWTH: Final = 1.25
# Tasks of one look.
_BATCH: Final = 500
# What is nearer to its turn than this share of its pause is looked for with what is due.
_NEARLY: Final = 0.5

#: Of ``find_results``: id, place, format and value.
Found: TypeAlias = tuple[Any, ...]

_UNENDED: Final = frozenset({"waiting", "running"})


class Ending(NamedTuple):
    """What became of a task."""

    place: str
    """``result``, ``completed``, ``failed``, ``cancelled``, ``expired``, or ``nowhere``."""
    value: Any = None
    """Of a ``result``."""


class Wait:
    """One caller's wait for one task.

    Args:
        id_: the task's.
        poll_interval: seconds between two looks, at most.
        wake: called, on the thread of whoever looked, when the task has ended.
    """

    __slots__ = ("due", "ending", "id", "pause", "poll_interval", "wake")

    def __init__(self, id_: int, poll_interval: float, wake: Callable[[], object]) -> None:
        self.id = id_
        self.poll_interval = poll_interval
        self.wake = wake
        self.pause = min(SOON, poll_interval)
        #: When to look next, by `time.monotonic`.
        self.due = time.monotonic()
        #: None: it has not ended, as far as anybody looked.
        self.ending: Ending | None = None

    def note(self, ending: Ending | None, now: float) -> None:
        """What a look has found; None: it has not ended."""
        if ending is not None:
            self.ending = ending
            self.wake()
        else:
            self.due = now + self.pause
            self.pause = min(self.pause * _GROWTH, self.poll_interval)


class Waits:
    """The waits of one client, for any number of threads.

    Args:
        find: ``find_results`` for these ids. Called by one thread at a time.
    """

    __slots__ = ("_find", "_lock", "_pid", "_turn", "_waits")

    def __init__(self, find: Callable[[list[int]], Sequence[Found]]) -> None:
        self._find = find
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._waits: set[Wait] = set()

    def add(self, wait: Wait) -> None:
        """Have looks of others look for it, too."""
        if self._pid != os.getpid():
            # After a fork these are the waits of threads that are not here.
            self._reset()
        with self._lock:
            self._waits.add(wait)

    def drop(self, wait: Wait) -> None:
        """It is waited for no longer."""
        with self._lock:
            self._waits.discard(wait)

    def look(self, wait: Wait) -> None:
        """Look for it, and for the others that are nearly due, unless another thread just did. What `find` raises is the caller's."""
        due = wait.due
        with self._turn:
            if wait.ending is not None or wait.due != due:
                return
            now = time.monotonic()
            with self._lock:
                others = [one for one in self._waits if one is not wait and _is_nearly_due(one, now)]
            waits = [wait, *others[: _BATCH - 1]]
            rows = self._find(sorted({one.id for one in waits}))
            _note(waits, rows)

    def wait(self, id_: int, deadline: float | None, poll_interval: float) -> Ending | None:
        """Wait on this thread until the task has ended. None: it has not by the deadline (`time.monotonic`), after a last look."""
        ended = threading.Event()
        wait = Wait(id_, poll_interval, ended.set)
        self.add(wait)
        try:
            while wait.ending is None:
                now = time.monotonic()
                is_over = deadline is not None and now >= deadline
                if is_over or now >= wait.due:
                    self.look(wait)
                    if is_over:
                        break
                else:
                    ended.wait((wait.due if deadline is None else min(wait.due, deadline)) - now)
            return wait.ending
        finally:
            self.drop(wait)


class AsyncWaits:
    """The waits of one client, for any number of coroutines of one event loop.

    Args:
        find: ``find_results`` for these ids.
    """

    __slots__ = ("_find", "_waits")

    def __init__(self, find: Callable[[list[int]], Awaitable[Sequence[Found]]]) -> None:
        self._find = find
        self._waits: set[Wait] = set()

    async def wait(self, id_: int, deadline: float | None, poll_interval: float) -> Ending | None:
        """As `Waits.wait`."""
        ended = asyncio.Event()
        wait = Wait(id_, poll_interval, ended.set)
        self._waits.add(wait)
        try:
            while wait.ending is None:
                now = time.monotonic()
                is_over = deadline is not None and now >= deadline
                if is_over or now >= wait.due:
                    await self._look(wait)
                    if is_over:
                        break
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(
                            ended.wait(), (wait.due if deadline is None else min(wait.due, deadline)) - now
                        )
            return wait.ending
        finally:
            self._waits.discard(wait)

    async def _look(self, wait: Wait) -> None:
        others = [one for one in self._waits if one is not wait and _is_nearly_due(one, time.monotonic())]
        waits = [wait, *others[: _BATCH - 1]]
        for one in waits:
            # This look is theirs: none of them makes one of its own meanwhile.
            one.due = time.monotonic() + one.pause
        rows = await self._find(sorted({one.id for one in waits}))
        _note(waits, rows)


def _note(waits: Sequence[Wait], rows: Sequence[Found]) -> None:
    found = {id_: _ending(place, format_, value) for id_, place, format_, value in rows}
    now = time.monotonic()
    for one in waits:
        one.note(found.get(one.id, Ending("nowhere")), now)


def _is_nearly_due(wait: Wait, now: float) -> bool:
    return wait.ending is None and wait.due - now <= wait.pause * _NEARLY


def _ending(place: str, format_: str | None, value: bytes | None) -> Ending | None:
    if place in _UNENDED:
        return None
    if place != "result" or value is None:
        return Ending(place)
    return Ending(place, json.loads(value) if format_ == "j" else bytes(value))


def refusal(record: TaskRecord) -> TaskError | None:
    """Why a task that was found ended, and is now this, has no result to give. None: it goes on, somebody retried it."""
    match record.state:
        case "completed":
            why = "its handler keeps none, or the time to keep it is over (result_ttl)"
            return ResultNotKept(f"task {record.id} has completed, and its result is not there: {why}", record)
        case "failed":
            why = f": {record.errors[-1].error}" if record.errors else ""
            return TaskFailed(f"task {record.id} has failed{why}", record)
        case "cancelled":
            return TaskFailed(f"task {record.id} was cancelled", record)
        case "expired":
            return TaskFailed(f"task {record.id} has expired", record)
    return None


__all__ = ["POLL_INTERVAL", "SOON", "AsyncWaits", "Ending", "Wait", "Waits", "refusal"]
