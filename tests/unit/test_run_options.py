"""A task's own timeout and retry policy as they are given, as data, and as a client reads them."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq import App, ConstantBackoff, EnqueueError, ExponentialBackoff, FastqError, Producer, SettingsError, Task
from fastq._backoff import Backoff, from_words
from fastq._records import _read_content
from fastq.cli._lines import BadLineError, parse
from fastq.control import SnoozeWithError
from fastq.outcome import FailureHandler
from fastq.task import DURATION_LIMIT

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.lists(st.integers())
    | st.timedeltas()
)


def test_defaults_cost_nothing() -> None:
    for task in (Task("t"), Task("t", timeout=None, retry=None), Task("t", expires_at=None)):
        assert task._extras is None
        assert (task.timeout, task.retry, task.expires_at, task.token_options) == (None, None, None, None)


def test_what_is_given_is_kept() -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    options: dict[str, Any] = {"expires_at": at, "idempotency_token": "a", "token_scope": "global"}
    task = Task("t", timeout=timedelta(minutes=1), retry=ConstantBackoff(5), **options)
    assert (task.timeout, task.retry, task.expires_at) == (60.0, ConstantBackoff(5), at)
    assert task.token_options is not None
    assert task.token_options.scope == "global"
    assert "timeout=60.0, retry=ConstantBackoff(seconds=5.0)" in repr(task)
    assert task == Task("t", timeout=60, retry=ConstantBackoff(5), **options)
    assert task != Task("t", timeout=61, retry=ConstantBackoff(5), **options)
    for twin in (copy.copy(task), pickle.loads(pickle.dumps(task))):  # noqa: S301 our own
        assert twin == task


def test_they_can_be_changed_as_other_attributes() -> None:
    task = Task("t", timeout=5)
    task.retry, task.expires_at = ExponentialBackoff(exponent=1), datetime(2030, 1, 1, tzinfo=UTC)
    assert (task.timeout, task.retry) == (5, ExponentialBackoff(exponent=1))
    task.timeout = task.retry = task.expires_at = None
    assert task == Task("t")


@pytest.mark.parametrize(
    "timeout", [0, -1, float("nan"), float("inf"), DURATION_LIMIT * 1.01, 10**400, timedelta(0), timedelta(-1)]
)
def test_a_timeout_is_above_0_and_finite(timeout: Any) -> None:
    with pytest.raises(SettingsError, match="timeout is"):
        Task("t", timeout=timeout)


@pytest.mark.parametrize("timeout", ["5", True, b"5", [5]])
def test_a_timeout_is_a_number_or_a_timedelta(timeout: Any) -> None:
    with pytest.raises(TypeError, match="timeout is"):
        Task("t", timeout=timeout)


class _Own(ConstantBackoff):
    __slots__ = ()


@pytest.mark.parametrize(
    "retry",
    [5, "exponential", {"constant": 5}, ConstantBackoff, lambda task, error: 5, _Own(5)],
    ids=["number", "text", "dict", "class", "function", "subclass"],
)
def test_what_can_not_be_stored_is_no_retry_of_a_task(retry: Any) -> None:
    with pytest.raises(TypeError, match=r"retry is .* but must be an ExponentialBackoff or a ConstantBackoff"):
        Task("t", retry=retry)


@given(ANYTHING, ANYTHING)
def test_any_value_is_kept_or_refused(timeout: Any, retry: Any) -> None:
    seconds: Any = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if retry is not None or not (timeout is None or (is_number and 0 < seconds <= DURATION_LIMIT)):
        with pytest.raises((SettingsError, TypeError), match=r"^(timeout|retry) is"):
            Task("t", timeout=timeout, retry=retry)
        return
    assert Task("t", timeout=timeout, retry=retry).timeout == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeout": 0}, "timeout is 0, but must be above 0"),
        ({"timeout": -5.0}, "timeout is -5, but must be above 0"),
        ({"timeout": float("nan")}, "timeout is NaN, but must be above 0"),
        ({"timeout": "30"}, "timeout must be a number of seconds, not str"),
        ({"timeout": timedelta(seconds=3)}, "timeout must be a number of seconds, not timedelta"),
        ({"retry": 5}, "retry must be an ExponentialBackoff or a ConstantBackoff, not int"),
        ({"retry": _Own(5)}, "retry must be an ExponentialBackoff or a ConstantBackoff, not _Own"),
        ({"_extras": 5}, "_extras is int, but must be what Task made of it"),
        ({"_extras": (None, None)}, "_extras is tuple, but must be what Task made of it"),
    ],
)
def test_the_engine_looks_again(changes: dict[str, Any], message: str) -> None:
    """Before it connects: nobody is there to connect to."""
    task = Task("t")
    for name, value in changes.items():
        setattr(task, name, value)
    producer = Producer("postgresql://127.0.0.1:1/none", connect_timeout=0.1)
    with producer, pytest.raises(EnqueueError, match=message):
        producer.enqueue(task)


def test_the_engine_looks_again_into_a_policy() -> None:
    policy = ExponentialBackoff()
    object.__setattr__(policy, "jitter", 7)
    task = Task("t", retry=policy)
    producer = Producer("postgresql://127.0.0.1:1/none", connect_timeout=0.1)
    with producer, pytest.raises(EnqueueError, match="retry's jitter is 7, but must be 0 to 1"):
        producer.enqueue(task)


def test_of_an_apps_function() -> None:
    app = App("postgresql://nobody")

    @app.task("t", timeout=5, retry_policy=ConstantBackoff(1))
    def f(n: int) -> None: ...

    assert (f.task(1).timeout, f.task(1).retry) == (None, None)
    patient = f.with_options(timeout=60, retry=ConstantBackoff(9))
    assert (patient.task(1).timeout, patient.task(1).retry) == (60, ConstantBackoff(9))
    again = patient.with_options(timeout=None, idempotency_token="a", token_scope="queue").task(1)
    assert (again.timeout, again.retry) == (None, ConstantBackoff(9))
    with pytest.raises(SettingsError, match="timeout is 0"):
        f.with_options(timeout=0)


# --- as data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ({"constant": 5}, ConstantBackoff(5)),
        ({"constant": 0.5}, ConstantBackoff(0.5)),
        ({"exponential": {}}, ExponentialBackoff()),
        ({"exponential": {"exponent": 2, "maximum": 600}}, ExponentialBackoff(exponent=2, maximum=600)),
        ({"exponential": {"jitter": 0}}, ExponentialBackoff(jitter=0)),
    ],
)
def test_words_are_a_policy(words: Any, policy: Backoff) -> None:
    assert from_words(words) == policy
    line = {"type": "t", "timeout": 30, "retry": words}
    assert parse(json.dumps(line).encode()) == Task("t", timeout=30, retry=policy)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (5, "retry is 5, but must be"),
        ({}, "retry is {}, but must be"),
        ({"linear": 5}, "retry is .* but must be"),
        ({"constant": 5, "exponential": {}}, "retry is .* but must be"),
        ({"exponential": 5}, "retry is .* but must be"),
        ({"exponential": {"base": 5}}, "with some of exponent, jitter, maximum"),
        ({"constant": "5"}, "retry's constant is '5'"),
        ({"constant": -5}, "retry's constant is -5"),
        ({"exponential": {"exponent": "2"}}, "retry's exponent is '2', but must be a number"),
        ({"exponential": {"jitter": True}}, "retry's jitter is True"),
        ({"exponential": {"jitter": 5}}, "jitter is 5"),
        ({"exponential": {"maximum": None}}, "retry's maximum is None"),
    ],
)
def test_other_words_are_none(words: Any, reason: str) -> None:
    with pytest.raises(BadLineError, match=reason):
        parse(json.dumps({"type": "t", "retry": words}).encode())


@given(st.recursive(ANYTHING, lambda inner: st.dictionaries(st.sampled_from(["constant", "exponential", "x"]), inner)))
def test_any_words_are_a_policy_or_refused(words: Any) -> None:
    try:
        policy = from_words(words)
    except (FastqError, TypeError):
        return
    assert isinstance(policy, ConstantBackoff | ExponentialBackoff)


def test_a_line_with_a_wrong_timeout_is_a_bad_one() -> None:
    for timeout, reason in [("0", "timeout is 0"), ('"30"', "timeout is '30'"), ("-1", "timeout is -1")]:
        with pytest.raises(BadLineError, match=reason):
            parse(b'{"type": "t", "timeout": %s}' % timeout.encode())
    assert parse(b'{"type": "t", "timeout": null, "retry": null}') == Task("t")


# --- as a client reads them ------------------------------------------------------------------------


def test_what_is_stored_is_read() -> None:
    assert _read_content("j", b'{"a":1}') == ({"a": 1}, None, None)
    assert _read_content("b", b"{}\n1") == (b"{}\n1", None, None)
    assert _read_content("J", b'{"timeout":30}\n"a"') == ("a", 30.0, None)
    assert _read_content("B", b'{"retry":{"constant":5}}\na\nb') == (b"a\nb", None, ConstantBackoff(5))


@given(st.binary())
def test_a_damaged_line_is_shown_as_none(line: bytes) -> None:
    """No list fails for it."""
    line = line.replace(b"\n", b"")
    assert _read_content("B", line + b"\npayload") == (b"payload", None, None)
    assert _read_content("B", line) == (line, None, None)


@pytest.mark.parametrize(
    "line", [b"5", b"[]", b'{"timeout":0.5,"retry":7}', b'{"timeout":-1}', b'{"timeout":"1"}', b'{"retry":[]}']
)
def test_a_line_that_says_what_none_does_is_shown_as_none(line: bytes) -> None:
    assert _read_content("J", line + b"\n[1]") == ([1], None, None)


# --- what becomes of a failure ---------------------------------------------------------------------


class _Info:
    id, type, handler, attempt, max_attempts = 17, "t", 0, 2, 3

    def __init__(self, retry: Backoff | None) -> None:
        self.retry = retry


@pytest.mark.parametrize(("retry", "delay"), [(None, 5.0), (ConstantBackoff(9), 9.0)])
def test_the_tasks_own_policy_wins(retry: Backoff | None, delay: float) -> None:
    handle: Any = FailureHandler([ConstantBackoff(5)])
    assert handle(_Info(retry), ValueError())[1] == delay
    # But not over what the handler says of this failure.
    assert handle(_Info(retry), SnoozeWithError(33))[1] == 33
