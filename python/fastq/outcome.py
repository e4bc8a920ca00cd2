"""What becomes of an attempt that raised: the wait before the next one, and the texts that are kept of the error."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from traceback import TracebackException
from types import TracebackType
from typing import TYPE_CHECKING, Final

from fastq.retry import ExponentialBackoff, RetryPolicy
from fastq.task import to_seconds

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

#: Bytes of a traceback that are kept unless the consumer is told otherwise.
TRACEBACK_LIMIT: Final = 64 * 1024
#: Bytes of an error's own text.
ERROR_LIMIT: Final = 8 * 1024
# Characters of it that go into the log, on one line.
_LOGGED: Final = 500
# The innermost frames; with them a recursion too deep takes milliseconds, not a second.
_FRAMES: Final = 64
_OWN_CODE: Final = f"{Path(__file__).parent}{os.sep}"

_log = logging.getLogger("fastq.handler")


class FailureHandler:
    """Turns an exception into ``(delay, error, traceback)``: the delay in seconds, None where no attempt is left.

    It never raises, whatever the exception or the policy does. Called on the thread that ran the handler.

    Args:
        policy: asked for the wait where an attempt is left.
        traceback_limit: bytes of a traceback that are kept.
    """

    __slots__ = ("_policy", "_traceback_limit")

    def __init__(self, policy: RetryPolicy, traceback_limit: int = TRACEBACK_LIMIT) -> None:
        self._policy = policy
        self._traceback_limit = traceback_limit

    def __call__(self, task: TaskInfo, error: BaseException) -> tuple[float | None, str, str]:
        """What to store of ``error``, and when to try again."""
        delay = self._delay(task, error) if task.attempt < task.max_attempts else None
        text = describe(error)
        with contextlib.suppress(Exception):
            _report(task, delay, text)
        return delay, text, format_traceback(error, self._traceback_limit)

    def _delay(self, task: TaskInfo, error: BaseException) -> float:
        try:
            return to_seconds("the retry policy's delay", self._policy.delay(task, error))
        except (Exception, SystemExit):  # noqa: BLE001 - a class of the user's
            # The attempt's outcome must not be lost for a policy's sake, nor for a log's.
            with contextlib.suppress(Exception):
                _log.exception(
                    "retry policy %s failed for task %d: using the default", type(self._policy).__name__, task.id
                )
            return ExponentialBackoff().after(task.attempt)


def _report(task: TaskInfo, delay: float | None, text: str) -> None:
    fate = "failed for good" if delay is None else f"runs again in {delay:.1f} s"
    _log.log(
        logging.ERROR if delay is None else logging.WARNING,
        "task %d (%s) raised in attempt %d of %d and %s: %s",
        task.id,
        task.type,
        task.attempt,
        task.max_attempts,
        fate,
        " ".join(text[:_LOGGED].split()),
    )


def describe(error: BaseException) -> str:
    """The error's class and text, fit to be stored."""
    try:
        text = str(error)
    except (Exception, SystemExit) as second:  # noqa: BLE001 - a class of the user's
        text = f"(its text can't be had: str() raised {type(second).__name__})"
    name = type(error).__qualname__
    return fit(f"{name}: {text}" if text else name, ERROR_LIMIT)


def format_traceback(error: BaseException, limit: int = TRACEBACK_LIMIT) -> str:
    """The traceback with its causes, without fastq's own outer frames, cut in the middle to ``limit`` bytes."""
    try:
        formatted = TracebackException(
            type(error), error, _from_handler(error.__traceback__), limit=-_FRAMES, compact=True
        )
        text = "".join(formatted.format())
    except Exception as second:  # noqa: BLE001 - exception classes of the user's take part in it
        text = f"(the traceback can't be formatted: {type(second).__name__})"
    return fit(text, limit)


def _from_handler(traceback: TracebackType | None) -> TracebackType | None:
    inner = traceback
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
        inner = inner.tb_next
    # All frames are our own where the handler could not even be called.
    return inner if inner is not None else traceback


def fit(text: str, limit: int) -> str:
    """``text`` as PostgreSQL can hold it, of at most ``limit`` bytes: what is left out is left out in the middle."""
    data = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    # The end says what went wrong, the beginning where it came from.
    gap = f"\n... {len(data) - limit:,} bytes left out ...\n".encode()
    room = max(0, limit - len(gap))
    head = room // 4
    tail = data[len(data) - (room - head) :]
    return (data[:head] + gap + tail).decode("utf-8", "ignore")[: max(limit, 0)]


__all__ = ["ERROR_LIMIT", "TRACEBACK_LIMIT", "FailureHandler", "describe", "fit", "format_traceback"]
