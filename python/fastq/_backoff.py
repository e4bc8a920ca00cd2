"""The retry policies that are nothing but numbers: they can be stored with a task, and written down as data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Final, Protocol, TypeAlias

from fastq._durations import to_seconds
from fastq.errors import SettingsError

_DAY: Final = 86_400.0


class _Attempted(Protocol):
    """All that these policies ask of a task."""

    @property
    def attempt(self) -> int: ...


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

    def delay(self, task: _Attempted, error: BaseException) -> float:  # noqa: ARG002 - the protocol's
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

    def delay(self, task: _Attempted, error: BaseException) -> float:  # noqa: ARG002 - the protocol's
        """Seconds until the next attempt."""
        return to_seconds("seconds", self.seconds)


Backoff: TypeAlias = ExponentialBackoff | ConstantBackoff
"""What a task may bring as its own retry policy."""

_EXPONENTIAL: Final = tuple(field.name for field in fields(ExponentialBackoff))


def check_backoff(value: object) -> None:
    """That it can be stored with a task.

    Raises:
        TypeError: it can't: it is a function or a class of one's own, which only its own process could call.
    """
    if value.__class__ not in (ExponentialBackoff, ConstantBackoff):
        raise TypeError(
            f"retry is {value!r:.100}, but must be an ExponentialBackoff or a ConstantBackoff: "
            "functions and other policies are a type's or a consumer's (retry_policy), as they can't be stored with a task"
        )


def from_words(words: object) -> Backoff:
    """The policy that data means.

    Args:
        words: ``{"constant": seconds}`` or ``{"exponential": {"exponent": …, "jitter": …, "maximum": …}}``, in which what is left out is as
            by default.

    Raises:
        SettingsError: it means none, or a number is out of range.
        TypeError: a number is something else.
    """
    if isinstance(words, Mapping) and len(words) == 1:
        [(name, value)] = words.items()
        if name == "constant":
            return ConstantBackoff(to_seconds("retry's constant", value))
        if name == "exponential" and isinstance(value, Mapping) and value.keys() <= set(_EXPONENTIAL):
            for key, number in value.items():
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise TypeError(f"retry's {key} is {number!r:.100}, but must be a number")
            return ExponentialBackoff(**value)
    raise SettingsError(
        f'retry is {words!r:.100}, but must be {{"constant": seconds}} or {{"exponential": {{…}}}} '
        f"with some of {', '.join(_EXPONENTIAL)}"
    )


__all__ = ["Backoff", "ConstantBackoff", "ExponentialBackoff", "check_backoff", "from_words"]
