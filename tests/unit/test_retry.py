"""Backoffs: attempt⁴ seconds ± 10 %, at most a day; or always the same."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.errors import SettingsError
from fastq.retry import ConstantBackoff, ExponentialBackoff, RetryPolicy

DAY = 86_400.0


def _delay(policy: RetryPolicy, attempt: int) -> float | timedelta:
    return policy.delay(Mock(attempt=attempt), ValueError())


@given(st.integers(min_value=1, max_value=17))
def test_exponential_is_the_fourth_power_give_or_take_a_tenth(attempt: int) -> None:
    wait = _delay(ExponentialBackoff(), attempt)
    assert isinstance(wait, float)
    assert attempt**4 * 0.9 <= wait <= min(attempt**4 * 1.1, DAY)


@given(st.integers(min_value=19, max_value=32_767))
def test_exponential_never_exceeds_a_day(attempt: int) -> None:
    assert _delay(ExponentialBackoff(), attempt) == DAY


def test_exponential_jitters() -> None:
    assert len({_delay(ExponentialBackoff(), 2) for _ in range(20)}) > 1
    assert _delay(ExponentialBackoff(jitter=0), 2) == 16.0


def test_exponential_takes_its_own_shape() -> None:
    policy = ExponentialBackoff(exponent=2, jitter=0, maximum=timedelta(minutes=1))
    assert [_delay(policy, attempt) for attempt in (1, 3, 8)] == [1.0, 9.0, 60.0]


def test_the_largest_exponent_does_not_overflow() -> None:
    assert _delay(ExponentialBackoff(exponent=64), 32_767) == DAY


@pytest.mark.parametrize(
    "settings", [{"exponent": -1}, {"exponent": 65}, {"jitter": 1.5}, {"jitter": -0.1}, {"maximum": -1}]
)
def test_exponential_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        ExponentialBackoff(**settings)


def test_constant() -> None:
    assert _delay(ConstantBackoff(5), 1) == _delay(ConstantBackoff(timedelta(seconds=5)), 9) == 5.0
    assert _delay(ConstantBackoff(0), 1) == 0.0


def test_constant_refuses() -> None:
    with pytest.raises(SettingsError, match="seconds is -1"):
        ConstantBackoff(-1)


def test_both_are_policies() -> None:
    assert isinstance(ExponentialBackoff(), RetryPolicy)
    assert isinstance(ConstantBackoff(1), RetryPolicy)
    assert not isinstance(object(), RetryPolicy)
