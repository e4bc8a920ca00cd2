"""What a handler raises to say what becomes of its task, and how that is found in whatever it raised."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from fastq.task import to_seconds


class SkipRetry(Exception):  # noqa: N818 - it says what is to happen
    """Raised by a handler: the task fails for good, whatever attempts it has left. The attempt counts, and its error is kept.

    ``raise SkipRetry("no such customer")``, or ``raise SkipRetry from error``.
    """


class Snooze(Exception):  # noqa: N818 - it says what is to happen
    """Raised by a handler: the task runs again later, and this was no attempt: no error is kept, however often it happens.

    Args:
        seconds: from now, or a timedelta; 0: as soon as it can be claimed again.

    Attributes:
        seconds: the same as a number.

    Raises:
        SettingsError: negative, not finite, or over a century.
    """

    def __init__(self, seconds: float | timedelta) -> None:
        super().__init__(seconds)
        self.seconds = to_seconds("seconds", seconds)

    def __str__(self) -> str:
        return f"snoozed for {self.seconds:g} s"


class SnoozeWithError(Exception):
    """Raised by a handler: the attempt failed, its error is kept, and the next one comes when this says, not the retry policy.

    Where no attempt is left the task has failed for good.

    Args:
        seconds: from now until the next attempt, or a timedelta; 0: at once.
        message: what went wrong.

    Attributes:
        seconds: the first as a number.

    Raises:
        SettingsError: negative, not finite, or over a century.
    """

    def __init__(self, seconds: float | timedelta, message: str = "") -> None:
        super().__init__(seconds, message)
        self.seconds = to_seconds("seconds", seconds)
        self.message = message

    def __str__(self) -> str:
        return self.message or f"snoozed for {self.seconds:g} s after an error"


class TaskCancelled(BaseException):
    """Raised by ``TaskInfo.raise_if_cancelled()`` in a handler whose task was cancelled, has lost its claim or is out of time.

    Whatever becomes of such a run, it counts no longer. Let this pass: it is no failure, nothing is stored or retried, and no error
    hook is told. No ``Exception``, like ``asyncio.CancelledError``: ``except Exception`` in a handler does not take it for an error.
    Raised by a handler of its own accord, with nothing cancelled, it is a failure like any other.
    """


Control = SkipRetry | Snooze | SnoozeWithError

#: Of several in one group the one that says most: an end, then an error, then nothing but a wait.
_ORDER: Final = (Snooze, SnoozeWithError, SkipRetry)


def find_control(error: BaseException) -> Control | None:
    """What ``error`` says of its task: itself, else the first of its causes (``raise … from``) that says something.

    Of an ExceptionGroup's members `SkipRetry` goes before `SnoozeWithError`, that before `Snooze`; of two alike the longer wait.
    What was merely being handled when ``error`` was raised (its context) says nothing.
    """
    return _find(error, set())


def _find(error: BaseException | None, seen: set[int]) -> Control | None:
    # Causes can be made to run in a circle.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, Control):
            return error
        if isinstance(error, BaseExceptionGroup):
            found = [control for member in error.exceptions if (control := _find(member, seen)) is not None]
            if found:
                return max(found, key=_weight)
        error = error.__cause__
    return None


def _weight(control: Control) -> tuple[int, float]:
    order = next(at for at, kind in enumerate(_ORDER) if isinstance(control, kind))
    return order, 0.0 if isinstance(control, SkipRetry) else control.seconds


__all__ = ["Control", "SkipRetry", "Snooze", "SnoozeWithError", "TaskCancelled", "find_control"]
