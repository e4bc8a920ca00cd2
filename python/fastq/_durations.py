"""Durations, as every part takes them: a number of seconds, or a timedelta."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Final

from fastq.errors import SettingsError

#: No duration may be longer, in seconds: a century.
DURATION_LIMIT: Final = 36_525 * 86_400.0


def to_seconds(name: str, value: object) -> float:
    """A duration in seconds, from a number or a timedelta.

    Raises:
        SettingsError: it is negative, not finite, or over a century.
        TypeError: it is something else.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # An int may be too large for a float.
        seconds = float(value) if abs(value) <= DURATION_LIMIT else math.nan
    else:
        raise TypeError(f"{name} is {value!r}, but must be seconds or a timedelta")
    if not 0 <= seconds <= DURATION_LIMIT:
        raise SettingsError(f"{name} is {value!r}, but must be from 0 to {DURATION_LIMIT:.0f} seconds")
    return seconds


__all__ = ["DURATION_LIMIT", "to_seconds"]
