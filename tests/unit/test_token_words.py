"""A token's options as they are given: what is right is kept, what is wrong is refused where it is made."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastq import DuplicateTask, FastqError, SettingsError, Task
from fastq.task import DURATION_LIMIT, OnConflict, TokenKeywords, TokenOptions, TokenScope, TokenUntil

CHOICES = {"token_scope": TokenScope, "token_until": TokenUntil, "on_conflict": OnConflict}


def make(**options: Any) -> Task:
    return Task("t", idempotency_token="x", **options)


def test_defaults_cost_nothing() -> None:
    assert Task("t", idempotency_token="x").token_options is None
    assert make(token_scope="type", token_until="removed", token_ttl=None, on_conflict="existing").token_options is None
    assert make(token_scope="type") == Task("t", idempotency_token="x")


def test_what_is_given_is_kept() -> None:
    task = make(token_scope="queue", token_until="ended", token_ttl=timedelta(minutes=1), on_conflict="raise")
    assert task.token_options == TokenOptions("queue", "ended", 60.0, "raise")
    assert "token_options=TokenOptions(scope='queue'" in repr(task)
    assert task != make(token_scope="queue")


@pytest.mark.parametrize("name", TokenKeywords.__annotations__)
def test_an_option_without_a_token_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 5 if name == "token_ttl" else "raise"}
    with pytest.raises(SettingsError, match=f"{name} without an idempotency_token"):
        Task("t", **options)


def test_an_option_that_there_is_not_is_a_wrong_call() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_life'"):
        make(token_life=3)


@pytest.mark.parametrize(
    "ttl", [0, -1, float("nan"), float("inf"), DURATION_LIMIT * 1.01, 10**400, timedelta(0), timedelta(-1)]
)
def test_a_time_to_hold_it_is_above_0_and_finite(ttl: Any) -> None:
    with pytest.raises(SettingsError, match="token_ttl is"):
        make(token_ttl=ttl)


@pytest.mark.parametrize("ttl", ["5", True, b"5", [5]])
def test_a_time_to_hold_it_is_a_number_or_a_timedelta(ttl: Any) -> None:
    with pytest.raises(TypeError, match="token_ttl is"):
        make(token_ttl=ttl)


_ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.lists(st.integers())
    | st.timedeltas()
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "token_scope": _ANYTHING | st.sampled_from(get_args(TokenScope)),
            "token_until": _ANYTHING | st.sampled_from(get_args(TokenUntil)),
            "on_conflict": _ANYTHING | st.sampled_from(get_args(OnConflict)),
            "token_ttl": _ANYTHING,
        },
    )
)
def test_any_value_is_either_one_of_an_options_own_or_refused(options: dict[str, Any]) -> None:
    is_right = all(name not in options or options[name] in get_args(kind) for name, kind in CHOICES.items())
    ttl = options.get("token_ttl")
    seconds: Any = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    is_right = is_right and (ttl is None or (is_number and 0 < seconds <= DURATION_LIMIT))
    if not is_right:
        with pytest.raises((SettingsError, TypeError), match=r"^(token_|on_conflict)"):
            make(**options)
        return
    task = make(**options)
    if task.token_options is not None:
        assert task.token_options.scope == options.get("token_scope", "type")


def test_a_duplicate_is_an_enqueue_error_that_can_be_pickled() -> None:
    error = DuplicateTask("task 5 has it", existing_id=5, index=3)
    assert isinstance(error, FastqError)
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 our own
    assert (str(back), back.existing_id, back.index, back.committed) == ("task 3: task 5 has it", 5, 3, None)
