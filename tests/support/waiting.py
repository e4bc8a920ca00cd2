"""Waiting for a condition instead of for the clock."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE: Final = float(os.environ.get("FASTQ_TEST_PATIENCE", "30"))
"""Seconds after which what only has to come about has not: many, on a machine that is busy with other things."""
_PAUSE = 0.01
"""Seconds between two looks at first; they grow to ten times that, so that a long wait costs little."""


def wait_until(predicate: Callable[[], T], *, timeout: float = PATIENCE, message: str = "") -> T:
    """Calls `predicate` until it gives something true, and gives that.

    An error in it counts as "not yet" (a server that is coming back refuses connections), and is the failure's cause.

    Args:
        predicate: looks at the condition.
        timeout: seconds after which the test fails.
        message: what was waited for; default: the predicate's own source.

    Raises:
        AssertionError: the condition had not come about in time; says what was seen last.
    """
    started = time.monotonic()
    pause = _PAUSE
    while True:
        last, error = _look(predicate)
        if error is None and last:
            return last
        if time.monotonic() - started >= timeout:
            raise _late(predicate, timeout, message, last, error) from error
        time.sleep(pause)
        pause = min(pause * 1.2, _PAUSE * 10)


async def wait_until_async(
    predicate: Callable[[], T | Awaitable[T]],
    *,
    timeout: float = PATIENCE,  # noqa: ASYNC109 its failure says what did not happen
    message: str = "",
) -> T:
    """`wait_until` for coroutines: leaves the loop free meanwhile; `predicate` may be async itself."""
    started = time.monotonic()
    pause = _PAUSE
    while True:
        last, error = _look(predicate)
        if inspect.isawaitable(last):
            try:
                last = await last
            except Exception as raised:  # noqa: BLE001 whatever it is, it is what was seen
                last, error = None, raised
        if error is None and last:
            return last
        if time.monotonic() - started >= timeout:
            raise _late(predicate, timeout, message, last, error) from error
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, _PAUSE * 10)


def until_the_next_notification() -> None:
    """Lets the 5 ms pass in which a process notifies once, so that its next enqueue does."""
    over = time.monotonic() + 0.006
    wait_until(lambda: time.monotonic() > over)


def _look(predicate: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return predicate(), None
    except Exception as error:  # noqa: BLE001 whatever it is, it is what was seen
        return None, error


def _late(
    predicate: Callable[[], object], timeout: float, message: str, last: object, error: Exception | None
) -> AssertionError:
    if not message:
        try:
            message = inspect.getsource(predicate).strip()
        except (OSError, TypeError):
            message = repr(predicate)
    seen = f"it gave {last!r}" if error is None else f"it raised {error!r}"
    return AssertionError(f"waited {timeout:g} s in vain for: {message}\nat last {seen}")
