"""pytest-benchmark's way to time a whole action a round, with its types said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pytest_benchmark.fixture import BenchmarkFixture

R = TypeVar("R")


def time_rounds(
    benchmark: BenchmarkFixture,
    action: Callable[..., R],
    *,
    rounds: int,
    setup: Callable[[], Any] | None = None,
    teardown: Callable[..., None] | None = None,
) -> R:
    """Time ``action`` once a round, after one that does not count; ``setup`` may give its arguments. Returns its last answer."""
    result: R = benchmark.pedantic(  # type: ignore[no-untyped-call]
        action, setup=setup, teardown=teardown, rounds=rounds, iterations=1, warmup_rounds=1
    )
    return result
