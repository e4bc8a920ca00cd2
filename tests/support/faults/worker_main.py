"""A worker process: ``worker_main.py SPEC``, a JSON object that `processes.WorkerProcess` writes. Works until SIGTERM.

Its handlers do what a task's payload orders, and write down that they started and ended. Orders, together in one object:

- ``kill``: end the process, by ``"signal"`` (SIGKILL), ``"exit"`` (os._exit) or ``"segfault"``.
- ``stop_once``: a path; the first that gets there stops the whole process (SIGSTOP), any later one goes on.
- ``hold_lock_ms``: keep the interpreter's lock for so long.
- ``gate``: the path of a gate to wait at.
- ``seconds``: take so long.
- ``effect``: write a row into ``chaos.effect`` and complete the task in that transaction, open for ``seconds``: ``"commit"``, or
  ``"rollback"``, which the first attempt does and returns; others commit. An error of either ends the run.
- ``fail``: raise in so many first attempts, whatever was done before.
- ``options``: the timeout and the retry policy that the task was enqueued with. A run that has others does nothing else, and says so.

Bytes are orders in JSON. A payload of ``"quiet"`` does nothing and is not written down.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg

from fastq import ConstantBackoff, Consumer, TaskInfo

_SPEC: Final[dict[str, Any]] = json.loads(sys.argv[1])
_JOURNAL: Final = os.open(_SPEC["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
#: Between two looks at a gate, for handlers that must not block.
_LOOK: Final = 0.02

#: How the handlers themselves connect, as an application does: few connections of each kind, which are kept.
_USER: Final[dict[str, Any]] = {
    "conninfo": _SPEC["settings"]["dsn"],
    "application_name": "handler",
    "connect_timeout": 5,
}
_ROOM: Final = threading.BoundedSemaphore(8)
_ASYNC_ROOM: Final = asyncio.Semaphore(8)
_KEPT: Final[list[psycopg.Connection]] = []
_ASYNC_KEPT: Final[list[psycopg.AsyncConnection]] = []
_EFFECT: Final = "INSERT INTO chaos.effect (id, attempt, pid) VALUES (%s, %s, %s)"

_C = TypeVar("_C", psycopg.Connection, psycopg.AsyncConnection)

_log = logging.getLogger("worker")


def _note(word: str, task: TaskInfo) -> None:
    os.write(_JOURNAL, f"{word} {task.id} {task.attempt} {os.getpid()} {time.monotonic():.6f}\n".encode())


def _die_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_by_exit() -> None:
    os._exit(1)


def _die_by_segfault() -> None:
    ctypes.string_at(0)


_DEATHS: Final[dict[str, Callable[[], None]]] = {
    "signal": _die_by_signal,
    "exit": _die_by_exit,
    "segfault": _die_by_segfault,
}


def _orders(task: TaskInfo) -> Any:
    payload = task.payload
    return json.loads(payload) if isinstance(payload, bytes) else payload or {}


def _has_lost_options(task: TaskInfo, orders: dict[str, Any]) -> bool:
    if "options" not in orders or orders["options"] == [task.timeout, repr(task.retry)]:
        return False
    _note("strange", task)
    return True


def _begin(task: TaskInfo, orders: dict[str, Any]) -> None:
    _note("start", task)
    if "kill" in orders:
        _DEATHS[orders["kill"]]()
    if "stop_once" in orders and _is_first(orders["stop_once"]):
        # To this thread, so that it comes no further: to the process, it goes on until another thread has taken note.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    if "hold_lock_ms" in orders:
        # poll(2) called as a function that keeps the interpreter's lock.
        ctypes.PyDLL(None).poll(None, 0, orders["hold_lock_ms"])


def _take(kept: list[_C]) -> _C | None:
    """One that the server has not ended meanwhile: then there would be something to read."""
    while True:
        try:
            user = kept.pop()
        except IndexError:
            return None
        if not select.select([user.fileno()], [], [], 0)[0]:
            return user
        user.pgconn.finish()


@contextmanager
def _transaction() -> Iterator[psycopg.Connection]:
    """Commits at its end. After an error the connection is given up, and with it the transaction."""
    with _ROOM:
        user = _take(_KEPT) or psycopg.connect(**_USER)
        try:
            yield user
            user.commit()
        except BaseException:
            user.close()
            raise
        _KEPT.append(user)


@asynccontextmanager
async def _transaction_async() -> AsyncIterator[psycopg.AsyncConnection]:
    async with _ASYNC_ROOM:
        user = _take(_ASYNC_KEPT) or await psycopg.AsyncConnection.connect(**_USER)
        try:
            yield user
            await user.commit()
        except BaseException:
            await user.close()
            raise
        _ASYNC_KEPT.append(user)


def _write_effect(task: TaskInfo, orders: dict[str, Any]) -> None:
    half = orders.get("seconds", 0) / 2
    with _transaction() as user:
        user.execute(_EFFECT, [task.id, task.attempt, os.getpid()])
        time.sleep(half)
        task.complete_tx(user)
        time.sleep(half)
        if _is_regretted(task, orders):
            user.rollback()


async def _write_effect_async(task: TaskInfo, orders: dict[str, Any]) -> None:
    half = orders.get("seconds", 0) / 2
    async with _transaction_async() as user:
        await user.execute(_EFFECT, [task.id, task.attempt, os.getpid()])
        await asyncio.sleep(half)
        await task.acomplete_tx(user)
        await asyncio.sleep(half)
        if _is_regretted(task, orders):
            await user.rollback()


def _is_regretted(task: TaskInfo, orders: dict[str, Any]) -> bool:
    return bool(orders.get("effect") == "rollback" and task.attempt == 1)


def _end(task: TaskInfo, orders: dict[str, Any]) -> None:
    fails = task.attempt <= orders.get("fail", 0)
    _note("fail" if fails or _is_regretted(task, orders) else "end", task)
    if fails:
        raise ValueError("as ordered")


def _is_first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _is_open(gate: str) -> bool:
    with Path(gate).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _handle(task: TaskInfo) -> None:
    orders = _orders(task)
    if orders == "quiet":
        return
    _begin(task, orders)
    if _has_lost_options(task, orders):
        return
    if "gate" in orders:
        with Path(orders["gate"]).open() as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
    if "effect" in orders:
        try:
            _write_effect(task, orders)
        except BaseException:
            _note("broke", task)
            raise
    elif "seconds" in orders:
        time.sleep(orders["seconds"])
    _end(task, orders)


async def _handle_async(task: TaskInfo) -> None:
    orders = _orders(task)
    if orders == "quiet":
        return
    _begin(task, orders)
    if _has_lost_options(task, orders):
        return
    while "gate" in orders and not _is_open(orders["gate"]):  # noqa: ASYNC110 another process opens it
        await asyncio.sleep(_LOOK)
    if "effect" in orders:
        try:
            await _write_effect_async(task, orders)
        except BaseException:
            _note("broke", task)
            raise
    elif "seconds" in orders:
        await asyncio.sleep(orders["seconds"])
    _end(task, orders)


def main() -> None:
    """Works until SIGTERM, then logs its counters."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level="DEBUG", filename=_SPEC["log"], format="%(levelname)s %(name)s: %(message)s")
    if _SPEC["switch_interval"] is not None:
        sys.setswitchinterval(_SPEC["switch_interval"])
    # For tests that shift it: what this process takes for the time of day.
    _log.info("wall clock %f", time.time())
    settings = dict(_SPEC["settings"])
    if _SPEC["retry"] is not None:
        settings["retry_policy"] = ConstantBackoff(_SPEC["retry"])
    consumer = Consumer(**settings)
    for type_, workers in _SPEC["types"].items():
        consumer.add_handler(type_, _handle_async if _SPEC["is_async"] else _handle, workers=workers)
    consumer.run()
    _log.info("stats %s", json.dumps(dict(consumer.stats())))


if __name__ == "__main__":
    main()
