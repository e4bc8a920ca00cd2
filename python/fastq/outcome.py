"""What becomes of an attempt that raised: whether it was one, the wait before the next, and the texts that are kept of the error."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from traceback import TracebackException
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from fastq.control import Control, SkipRetry, Snooze, SnoozeWithError, find_control
from fastq.errors import ResultError
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


Verdict = tuple[bool, float | None, str, str]
"""Of an attempt that raised: whether it is a snooze and no attempt; seconds until the next one, None: failed for good; the
error's text and its traceback, of a snooze empty."""


class ErrorHook(Protocol):
    """Is told of each attempt that failed, timed out too, before that is stored. Called on the thread that ran the handler."""

    def __call__(self, task: TaskInfo, error: BaseException, /, *, is_final: bool) -> object:
        """Look at an error; what is returned is dropped, and what is raised is logged.

        Args:
            task: as its handler saw it.
            error: what the handler raised.
            is_final: the task has failed for good.
        """


class FailureHandler:
    """Turns an exception into a `Verdict`.

    It never raises, whatever the exception, the policy or the hook does. Called on the thread that ran the handler.

    Args:
        policies: by the task's handler: asked for the wait where an attempt is left, the exception does not say it, and the task has no
            policy of its own.
        traceback_limit: bytes of a traceback that are kept.
        hook: told of what failed.
    """

    __slots__ = ("_hook", "_policies", "_traceback_limit")

    def __init__(
        self,
        policies: Sequence[RetryPolicy],
        traceback_limit: int = TRACEBACK_LIMIT,
        hook: ErrorHook | None = None,
    ) -> None:
        self._policies = policies
        self._traceback_limit = traceback_limit
        self._hook = hook

    def __call__(self, task: TaskInfo, error: BaseException) -> Verdict:
        """What becomes of the task whose handler raised ``error``."""
        control = _control(error)
        if isinstance(control, Snooze):
            with contextlib.suppress(Exception):
                _log.debug("task %d (%s) is put off: runs again in %.1f s", task.id, task.type, control.seconds)
            return True, control.seconds, "", ""
        delay = self._delay(task, error, control)
        text = describe(error)
        with contextlib.suppress(Exception):
            _report(task, delay, text)
        if self._hook is not None:
            self._tell(self._hook, task, error, is_final=delay is None)
        return False, delay, text, format_traceback(error, self._traceback_limit)

    def _delay(self, task: TaskInfo, error: BaseException, control: Control | None) -> float | None:
        # A handler that returned has done its work: again, it would do it twice and return the like.
        if isinstance(control, SkipRetry) or isinstance(error, ResultError) or task.attempt >= task.max_attempts:
            return None
        if isinstance(control, SnoozeWithError):
            return control.seconds
        policy = task.retry or self._policies[task.handler]
        try:
            return to_seconds("the retry policy's delay", policy.delay(task, error))
        except (Exception, SystemExit):  # noqa: BLE001 - a class of the user's
            # The attempt's outcome must not be lost for a policy's sake, nor for a log's.
            with contextlib.suppress(Exception):
                _log.exception("retry policy %s failed for task %d: using the default", type(policy).__name__, task.id)
            return ExponentialBackoff().after(task.attempt)

    @staticmethod
    def _tell(hook: ErrorHook, task: TaskInfo, error: BaseException, *, is_final: bool) -> None:
        try:
            hook(task, error, is_final=is_final)
        except (Exception, SystemExit):  # noqa: BLE001 - the user's
            with contextlib.suppress(Exception):
                _log.exception("the error hook failed for task %d", task.id)


def _control(error: BaseException) -> Control | None:
    try:
        return find_control(error)
    except Exception:  # noqa: BLE001 - classes of the user's take part in it, and groups can be nested too deep
        return None


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


__all__ = [
    "ERROR_LIMIT",
    "TRACEBACK_LIMIT",
    "ErrorHook",
    "FailureHandler",
    "Verdict",
    "describe",
    "fit",
    "format_traceback",
]
