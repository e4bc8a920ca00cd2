"""What a handler says of its task by what it raises: found, weighed, and checked where it is made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.control import SkipRetry, Snooze, SnoozeWithError, find_control
from fastq.errors import SettingsError
from fastq.outcome import FailureHandler
from fastq.retry import ConstantBackoff, ExponentialBackoff, read_policy


def _task(attempt: int = 1, max_attempts: int = 3) -> Any:
    return SimpleNamespace(id=17, type="t", handler=0, attempt=attempt, max_attempts=max_attempts, retry=None)


def _caused(error: BaseException, *causes: BaseException) -> BaseException:
    last = error
    for cause in causes:
        last.__cause__ = cause
        last = cause
    return error


@pytest.mark.parametrize("kind", [Snooze, SnoozeWithError])
def test_durations_are_checked_where_they_are_made(kind: Callable[[Any], Exception]) -> None:
    assert kind(0).seconds == 0.0  # type: ignore[attr-defined]
    assert kind(timedelta(minutes=1)).seconds == 60.0  # type: ignore[attr-defined]
    for bad in (-1, -0.001, float("nan"), float("inf"), 1e12, timedelta(seconds=-1)):
        with pytest.raises(SettingsError, match="seconds is"):
            kind(bad)
    for strange in ("5", None, True):
        with pytest.raises(TypeError, match="seconds is"):
            kind(strange)


def test_they_say_what_they_are_and_survive_a_copy() -> None:
    for error in (Snooze(5), SnoozeWithError(timedelta(seconds=5)), SnoozeWithError(5, "no answer"), SkipRetry("gone")):
        for made in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own
            assert (type(made), str(made), made.args) == (type(error), str(error), error.args)
    assert str(Snooze(5)) == "snoozed for 5 s"
    assert str(SnoozeWithError(5, "no answer")) == "no answer"
    assert str(SnoozeWithError(5)) == "snoozed for 5 s after an error"


def test_found_in_itself_its_causes_and_the_members_of_groups() -> None:
    skip, snooze, with_error = SkipRetry(), Snooze(1), SnoozeWithError(1)
    assert find_control(ValueError()) is None
    assert find_control(skip) is skip
    assert find_control(_caused(ValueError(), KeyError(), snooze)) is snooze
    # What was raised last is the last word.
    assert find_control(_caused(snooze, skip)) is snooze
    assert find_control(ExceptionGroup("two", [ValueError(), snooze])) is snooze
    assert find_control(ExceptionGroup("three", [snooze, skip, with_error])) is skip
    assert find_control(ExceptionGroup("two", [snooze, ExceptionGroup("in it", [with_error])])) is with_error
    assert find_control(ExceptionGroup("alike", [snooze, longer := Snooze(9), Snooze(2)])) is longer
    assert find_control(BaseExceptionGroup("all", [_caused(KeyboardInterrupt(), skip)])) is skip
    assert find_control(_caused(ExceptionGroup("of strangers", [ValueError()]), skip)) is skip


def test_what_was_only_being_handled_says_nothing() -> None:
    error = ValueError()
    error.__context__ = SkipRetry()
    assert find_control(error) is None


def test_causes_in_a_circle_end() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert find_control(one) is None


@given(
    st.recursive(
        st.builds(ValueError)
        | st.builds(SkipRetry)
        | st.builds(Snooze, st.just(1))
        | st.builds(SnoozeWithError, st.just(2)),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda members: ExceptionGroup("some", members)),
        max_leaves=8,
    )
)
def test_the_gravest_of_all_members_is_found(error: Exception) -> None:
    def leaves(error: BaseException) -> list[BaseException]:
        if isinstance(error, BaseExceptionGroup):
            return [leaf for member in error.exceptions for leaf in leaves(member)]
        return [error]

    kinds = {type(leaf) for leaf in leaves(error)}
    expected = next((kind for kind in (SkipRetry, SnoozeWithError, Snooze) if kind in kinds), None)
    found = find_control(error)
    assert (None if found is None else type(found)) is expected


def test_what_each_comes_to() -> None:
    handle = FailureHandler([ConstantBackoff(5)])
    assert handle(_task(1), Snooze(7)) == (True, 7.0, "", "")
    # However many attempts are left: it is none.
    assert handle(_task(3), Snooze(7)) == (True, 7.0, "", "")
    assert handle(_task(1), SnoozeWithError(7, "no"))[:3] == (False, 7.0, "SnoozeWithError: no")
    assert handle(_task(3), SnoozeWithError(7, "no"))[:3] == (False, None, "SnoozeWithError: no")
    assert handle(_task(1), SkipRetry("gone"))[:3] == (False, None, "SkipRetry: gone")
    assert handle(_task(1), _caused(ValueError("no"), SkipRetry()))[:3] == (False, None, "ValueError: no")


def test_a_group_nested_too_deep_is_an_error_as_others() -> None:
    error: Exception = SkipRetry()
    for _ in range(20_000):
        error = ExceptionGroup("deeper", [error])
    is_snooze, delay, _, _ = FailureHandler([ConstantBackoff(5)])(_task(1), error)
    assert (is_snooze, delay) == (False, 5.0)


def test_each_type_has_its_policy() -> None:
    handle = FailureHandler([ConstantBackoff(5), read_policy(lambda task, error: task.attempt * 100)])
    second = _task(2)
    second.handler = 1
    assert handle(_task(2), ValueError())[1] == 5.0
    assert handle(second, ValueError())[1] == 200.0


def test_what_is_a_retry_policy() -> None:
    policy = ConstantBackoff(1)
    assert read_policy(policy) is policy
    assert isinstance(read_policy(None), ExponentialBackoff)

    async def later(task: object, error: BaseException) -> float:
        return 1.0

    for bad in (5, "soon", ConstantBackoff, later):
        with pytest.raises(SettingsError, match="retry_policy is"):
            read_policy(bad)  # type: ignore[arg-type]


def test_the_hook_hears_of_failures_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, bool]] = []

    def hook(task: Any, error: BaseException, /, *, is_final: bool) -> None:
        heard.append((str(error), is_final))
        if str(error) == "bad":
            raise SystemExit(3)

    handle = FailureHandler([ConstantBackoff(5)], hook=hook)
    assert handle(_task(1), ValueError("bad"))[1] == 5.0
    handle(_task(3), ValueError("last"))
    handle(_task(1), SkipRetry("gone"))
    handle(_task(1), Snooze(1))
    assert heard == [("bad", False), ("last", True), ("gone", True)]
    assert "the error hook failed for task 17" in caplog.text
