"""What is kept of an exception, and what comes of the attempt."""

from __future__ import annotations

import logging
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq.outcome import ERROR_LIMIT, FailureHandler, describe, fit, format_traceback
from fastq.retry import ConstantBackoff


def _task(attempt: int = 1, max_attempts: int = 3) -> Any:
    return SimpleNamespace(id=17, type="t", handler=0, attempt=attempt, max_attempts=max_attempts, retry=None)


def _raise(error: BaseException, cause: BaseException | None) -> None:
    raise error from cause


def _raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        _raise(error, cause)
    except BaseException as caught:  # noqa: BLE001 - any of them
        return caught
    raise AssertionError


class _Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


def test_a_delay_while_attempts_are_left() -> None:
    _, delay, error, traceback = FailureHandler([ConstantBackoff(5)])(_task(2), _raised(ValueError("no")))
    assert delay == 5.0
    assert error == "ValueError: no"
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("ValueError: no\n")
    assert __file__ in traceback


def test_none_when_the_last_attempt_failed() -> None:
    assert FailureHandler([ConstantBackoff(5)])(_task(3), _raised(ValueError("no")))[1] is None
    assert FailureHandler([ConstantBackoff(5)])(_task(1, 1), _raised(ValueError("no")))[1] is None


def test_a_timedelta_from_a_policy() -> None:
    class Policy:
        def delay(self, task: object, error: BaseException) -> timedelta:
            return timedelta(minutes=1)

    assert FailureHandler([Policy()])(_task(), _raised(ValueError()))[1] == 60.0


@pytest.mark.parametrize("answer", [-1, float("nan"), "soon", None, RuntimeError("broken"), SystemExit(3)])
def test_a_policy_that_fails_costs_no_outcome(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Policy:
        def delay(self, task: object, error: BaseException) -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

    delay = FailureHandler([Policy()])(_task(2), _raised(ValueError()))[1]
    assert delay is not None
    assert 16 * 0.9 <= delay <= 16 * 1.1
    assert "retry policy Policy failed for task 17" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_would_end_the_process_is_a_failure_as_others(error: BaseException) -> None:
    _, delay, text, _ = FailureHandler([ConstantBackoff(1)])(_task(), _raised(error))
    assert delay == 1.0
    assert text.startswith(type(error).__name__)


def test_failures_are_logged_with_what_comes_next(caplog: pytest.LogCaptureFixture) -> None:
    handle = FailureHandler([ConstantBackoff(5)])
    handle(_task(1), _raised(ValueError("a\nb")))
    handle(_task(3), _raised(ValueError("no")))
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            "fastq.handler",
            logging.WARNING,
            "task 17 (t) raised in attempt 1 of 3 and runs again in 5.0 s: ValueError: a b",
        ),
        ("fastq.handler", logging.ERROR, "task 17 (t) raised in attempt 3 of 3 and failed for good: ValueError: no"),
    ]


def test_a_log_that_fails_costs_no_outcome(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError(record.name)

    logger = logging.getLogger("fastq.handler")
    logger.addFilter(broken := Broken())
    try:
        assert FailureHandler([ConstantBackoff(5)])(_task(), _raised(ValueError("no")))[1] == 5.0
    finally:
        logger.removeFilter(broken)
    assert caplog.records == []


def test_an_error_whose_str_raises() -> None:
    error = _raised(_Unspeakable())
    assert describe(error) == "_Unspeakable: (its text can't be had: str() raised RuntimeError)"
    assert "_Unspeakable" in format_traceback(error)


def test_an_error_whose_str_would_end_the_process() -> None:
    class Exits(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise SystemExit(3)

    assert describe(_raised(Exits())).endswith("Exits: (its text can't be had: str() raised SystemExit)")


def test_an_error_without_text() -> None:
    assert describe(ValueError()) == "ValueError"


def test_text_that_postgresql_refuses_is_cleaned() -> None:
    _, delay, text, traceback = FailureHandler([ConstantBackoff(1)])(_task(), _raised(ValueError("a\0b\ud800c")))
    assert delay == 1.0
    assert text == "ValueError: a\ufffdb?c"
    for kept in (text, traceback):
        assert "\0" not in kept
        kept.encode()


def test_ten_megabytes_of_text_are_cut_in_the_middle() -> None:
    error = _raised(ValueError("x" * 10_000_000 + "the end"))
    text, traceback = describe(error), format_traceback(error, 1000)
    assert len(text.encode()) <= ERROR_LIMIT
    assert text.startswith("ValueError: xxx")
    assert text.endswith("the end")
    assert "bytes left out" in text
    assert len(traceback.encode()) <= 1000
    assert traceback.startswith("Traceback")


def test_a_recursion_too_deep_keeps_its_innermost_frames() -> None:
    def deeper(n: int) -> int:
        return deeper(n + 1) + 1

    with pytest.raises(RecursionError) as caught:
        deeper(0)
    traceback = format_traceback(caught.value)
    assert "in deeper" in traceback
    assert "RecursionError" in traceback
    assert len(traceback) < 10_000


def test_causes_are_kept() -> None:
    traceback = format_traceback(_raised(ValueError("second"), _raised(KeyError("first"))))
    assert (
        traceback.index("KeyError: 'first'") < traceback.index("direct cause") < traceback.index("ValueError: second")
    )


def test_an_error_that_breaks_the_formatter_has_a_text() -> None:
    class Broken(Exception):  # noqa: N818
        @property
        def __notes__(self) -> list[str]:  # type: ignore[override]
            raise RuntimeError

    kept = format_traceback(_raised(Broken("x")))
    assert "Broken" in kept or kept == "(the traceback can't be formatted: RuntimeError)"


@given(st.text(), st.integers(min_value=0, max_value=300))
def test_fit_holds_the_limit_and_is_valid_utf8(text: str, limit: int) -> None:
    fitted = fit(text, limit)
    assert len(fitted.encode()) <= limit
    assert "\0" not in fitted
    if len(text.encode("utf-8", "replace")) <= limit and "\0" not in text:
        assert fitted == text.encode("utf-8", "replace").decode()
