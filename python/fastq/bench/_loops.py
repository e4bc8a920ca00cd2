"""Event loops beside the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Seconds for coroutines that are cancelled to end.
_GRACE: Final = 5.0


def run_coroutine(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it on a loop in a thread of its own, and wait for it.

    A signal is raised on the main thread at any step whatever: in the middle of a loop's own, a wake-up may be lost and the loop
    wait for it for ever.
    """
    outcome: Future[T] = Future()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []
    is_stopped = threading.Event()

    async def main() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        if is_stopped.is_set():
            raise asyncio.CancelledError
        return await make()

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="fastq-bench-loop", daemon=True)
    try:
        # Within: the signal may come while the thread starts.
        thread.start()
        return outcome.result()
    finally:
        is_stopped.set()
        for loop, task in running:
            # Closed: it has ended.
            with contextlib.suppress(RuntimeError):
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
        # The outcome is the thread's last step. One that has not quite started can't be joined.
        wait([outcome], _GRACE)


__all__ = ["run_coroutine"]
