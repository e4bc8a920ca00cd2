"""What a benchmark answers."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastq import _engine
from fastq.bench._server import Server

#: In each result; None where it does not apply, or can't be measured there.
FIGURES: Final = (
    "tasks",
    "seconds",
    "tasks_per_s",
    "client_cpu_us",
    "server_cpu_us",
    "server_other_cpu_us",
    "wal_bytes",
    "p50_ms",
    "p99_ms",
    "held_over_free",
    "of_bare",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """How long one call took, in milliseconds."""

    what: str
    calls: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark that was run and whose work was checked."""

    bench: str
    figures: dict[str, float | None]
    settings: dict[str, Any]
    """Those of the run."""
    server: Server
    notes: tuple[str, ...] = ()
    """What must be known beside the figures."""
    series: tuple[dict[str, float], ...] = ()
    """Figures over time, where it is measured: each with the same names."""
    measured: tuple[Measured, ...] = ()
    """What the figures are made of, where they are the most of many."""

    def to_json(self) -> dict[str, Any]:
        """One object, with all of `FIGURES`; numbers are rounded to six digits."""
        figures = dict.fromkeys(FIGURES) | self.figures
        return {
            "bench": self.bench,
            **{name: _round(value) for name, value in figures.items()},
            "settings": self.settings,
            "measured": [
                {"what": one.what, "calls": one.calls, "p50_ms": _round(one.p50_ms), "p99_ms": _round(one.p99_ms)}
                for one in self.measured
            ],
            "notes": self._all_notes(),
            "series": [{name: _round(value) for name, value in one.items()} for one in self.series],
            "versions": {
                "fastq": _engine.version,
                "python": platform.python_version(),
                "postgresql": self.server.version,
            },
            "server": {
                "is_embedded": self.server.is_embedded,
                "is_superuser": self.server.is_superuser,
                **self.server.settings,
            },
            "machine": {"system": platform.system(), "architecture": platform.machine(), "cpus": os.cpu_count()},
        }

    def _all_notes(self) -> list[str]:
        weakened = [
            f"{name} is off on this server: what it measures here may be gone after a crash"
            for name in self.server.weakened
        ]
        return [*weakened, *self.notes]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ``ordered`` values that at least ``share`` of them don't exceed."""
    # Rounded first: 0.99 * 100 is a little more than 99.
    rank = -int(-round(share * len(ordered), 6) // 1)
    return ordered[max(rank, 1) - 1]


def per(amount: float, number: float) -> float | None:
    """``amount`` for each of ``number``; None where there was none."""
    return amount / number if number else None


def _round(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return int(value) if value.is_integer() else float(f"{value:.6g}")


__all__ = ["FIGURES", "Measured", "Result", "per", "percentile"]
