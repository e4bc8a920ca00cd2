"""When a task that failed runs again."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from fastq.errors import SettingsError
from fastq.task import to_seconds

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

_DAY: Final = 86_400.0


@runtime_checkable
class RetryPolicy(Protocol):
    """Says how long a task waits after an attempt that failed. Called on the thread that ran the handler."""

    def delay(self, task: TaskInfo, error: BaseException) -> float | timedelta:
        """Seconds, or a timedelta, from now until the next attempt.

        Not asked where no attempt is left.

        Args:
            task: as its handler saw it; ``task.attempt`` is the attempt that failed, from 1.
            error: what the handler raised.
        """


RetryFunction = Callable[["TaskInfo", BaseException], float | timedelta]
"""A retry policy that is a function: called as `RetryPolicy.delay`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialBackoff:
    """Waits ``attempt ** exponent`` seconds, give or take ``jitter``: with the defaults 1, 16, 81, 256, ... seconds.

    Args:
        exponent: 0 or more.
        jitter: the share by which a wait may be longer or shorter, from 0 to 1.
        maximum: seconds, or a timedelta, that no wait exceeds; a day by default.

    Raises:
        SettingsError: a value out of range.
    """

    exponent: float = 4.0
    jitter: float = 0.1
    maximum: float | timedelta = _DAY

    def __post_init__(self) -> None:
        # Above 64 a float would overflow within the attempts that there can be.
        if not 0 <= self.exponent <= 64:
            raise SettingsError(f"exponent is {self.exponent!r}, but must be from 0 to 64")
        if not 0 <= self.jitter <= 1:
            raise SettingsError(f"jitter is {self.jitter!r}, but must be from 0 to 1")
        object.__setattr__(self, "maximum", to_seconds("maximum", self.maximum))

    def delay(self, task: TaskInfo, error: BaseException) -> float:  # noqa: ARG002 - the protocol's
        """Seconds until the next attempt."""
        return self.after(task.attempt)

    def after(self, attempt: int) -> float:
        """Seconds to wait after the attempt of that number, counted from 1."""
        wait = math.pow(attempt, self.exponent) * random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311
        return min(wait, to_seconds("maximum", self.maximum))


@dataclass(frozen=True, slots=True)
class ConstantBackoff:
    """Waits the same time before each attempt.

    Args:
        seconds: the wait, 0 or more; a timedelta is taken too.

    Raises:
        SettingsError: negative, not finite, or over a century.
    """

    seconds: float | timedelta

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", to_seconds("seconds", self.seconds))

    def delay(self, task: TaskInfo, error: BaseException) -> float:  # noqa: ARG002 - the protocol's
        """Seconds until the next attempt."""
        return to_seconds("seconds", self.seconds)


@dataclass(frozen=True, slots=True)
class _ByFunction:
    function: RetryFunction

    def delay(self, task: TaskInfo, error: BaseException) -> float | timedelta:
        return self.function(task, error)


def read_policy(value: RetryPolicy | RetryFunction | None) -> RetryPolicy:
    """The policy that is meant; None: `ExponentialBackoff()`.

    Raises:
        SettingsError: it is neither a policy nor a function, or one that only says its answer when awaited.
    """
    if value is None:
        return ExponentialBackoff()
    given: object = value
    policy: RetryPolicy | None = None
    # A class has the method too, but nobody to call it on.
    if not isinstance(given, type):
        if isinstance(given, RetryPolicy):
            policy = given
        elif callable(given):
            policy = _ByFunction(given)
    if policy is None:
        raise SettingsError(
            f"retry_policy is {value!r}, but must be a function (task, error) of the seconds to wait, "
            "or have a method delay(task, error)"
        )
    if inspect.iscoroutinefunction(policy.function if isinstance(policy, _ByFunction) else policy.delay):
        raise SettingsError(f"retry_policy is {value!r}, but must not be async")
    return policy


__all__ = ["ConstantBackoff", "ExponentialBackoff", "RetryFunction", "RetryPolicy", "read_policy"]
