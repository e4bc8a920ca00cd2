"""When a task that failed runs again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fastq._backoff import ConstantBackoff, ExponentialBackoff
from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._engine import TaskInfo


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
