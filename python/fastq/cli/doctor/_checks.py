"""What the doctor says of one thing, and how it puts numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "info", "warning", "problem"]

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    message: str
    advice: str | None = None
    """What to do; None: nothing."""


def some(things: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(things) - _SHOWN:,} more" if len(things) > _SHOWN else ""
    return "; ".join(things[:_SHOWN]) + more


def span(seconds: float) -> str:
    """A time in the unit that people would use: ``42 s``, ``3 min``, ``5 h``, ``2 d``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def count(number: int, word: str) -> str:
    """``1 task``, ``2,000 tasks``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def process(pid: int | None, host: str | None) -> str:
    """A consumer as people find it again."""
    return f"process {pid} on {host}" if pid is not None else "a consumer that nobody knows any more"
