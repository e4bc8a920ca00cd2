"""Task: what it takes, turns into and refuses."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.errors import SettingsError
from fastq.task import DURATION_LIMIT, Enqueued, Task, to_seconds


def test_defaults() -> None:
    task = Task("email:send")
    assert (task.payload, task.queue, task.delay, task.run_at, task.max_attempts, task.idempotency_token) == (
        None,
        "default",
        None,
        None,
        3,
        None,
    )


def test_a_timedelta_becomes_seconds() -> None:
    assert Task("t", delay=timedelta(minutes=1, milliseconds=500)).delay == 60.5
    assert Task("t", delay=2).delay == 2.0
    assert isinstance(Task("t", delay=2).delay, float)
    assert Task("t", delay=0).delay == 0.0


@pytest.mark.parametrize(
    "delay", [-1, -0.001, math.nan, math.inf, -math.inf, timedelta(seconds=-1), 10**400, DURATION_LIMIT * 1.001]
)
def test_a_negative_or_not_finite_delay_is_refused(delay: Any) -> None:
    with pytest.raises(SettingsError, match=r"delay is .*must be from 0 to"):
        Task("t", delay=delay)


@pytest.mark.parametrize("delay", ["5", True, object(), [1]])
def test_a_delay_that_is_no_duration_is_refused(delay: Any) -> None:
    with pytest.raises(TypeError, match=r"delay is .*seconds or a timedelta"):
        Task("t", delay=delay)


def test_a_naive_datetime_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"run_at is .*naive.*must be aware"):
        Task("t", run_at=datetime(2030, 1, 1))  # noqa: DTZ001 - the point


def test_a_run_at_that_is_no_datetime_is_refused() -> None:
    with pytest.raises(TypeError, match="run_at is '2030-01-01'"):
        Task("t", run_at="2030-01-01")  # type: ignore[arg-type]


def test_any_zone_is_taken() -> None:
    at = datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert Task("t", run_at=at).run_at == at
    assert Task("t", run_at=at.astimezone(UTC)).run_at == at


@pytest.mark.parametrize("max_attempts", [0, -1, 32_768, 2.5, "3", True, None])
def test_max_attempts_out_of_range_is_refused(max_attempts: Any) -> None:
    with pytest.raises(SettingsError, match=r"max_attempts is .*1 to 32,767"):
        Task("t", max_attempts=max_attempts)


@pytest.mark.parametrize("max_attempts", [1, 32_767])
def test_max_attempts_at_its_limits(max_attempts: int) -> None:
    assert Task("t", max_attempts=max_attempts).max_attempts == max_attempts


@pytest.mark.parametrize("priority", [-1, 10, 1.0, "3", True, False, None])
def test_a_priority_out_of_range_is_refused(priority: Any) -> None:
    with pytest.raises(SettingsError, match=r"priority is .*0 to 9"):
        Task("t", priority=priority)


@pytest.mark.parametrize("priority", [0, 9])
def test_a_priority_at_its_limits(priority: int) -> None:
    assert Task("t", priority=priority).priority == priority


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="weight"):
        Task("t", weight=1)  # type: ignore[call-arg]


def test_the_repr_shows_no_payload() -> None:
    text = repr(Task("login", {"password": "hunter2"}, delay=3, idempotency_token="x"))
    assert text == "Task('login', ..., delay=3.0, idempotency_token='x')"


def test_equal_by_value() -> None:
    assert Task("t", [1], delay=1) == Task("t", [1], delay=1.0)
    assert Task("t", [1]) != Task("t", [2])
    assert Task("t") != "t"
    with pytest.raises(TypeError, match="unhashable"):
        hash(Task("t"))


def test_enqueued_is_a_pair() -> None:
    id_, is_new = Enqueued(17, is_new=True)
    assert (id_, is_new) == (17, True)


@given(st.floats(min_value=0, max_value=DURATION_LIMIT))
def test_seconds_pass_unchanged(seconds: float) -> None:
    assert to_seconds("x", seconds) == seconds


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=36_525)))
def test_timedeltas_pass_as_seconds(delta: timedelta) -> None:
    assert to_seconds("x", delta) == delta.total_seconds()
