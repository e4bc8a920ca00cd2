"""App: functions that are tasks, as far as no database is needed."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fastq import App, SettingsError, Task


@pytest.fixture
def app() -> App:
    return App("host=nowhere")


def test_called_it_just_calls(app: App) -> None:
    @app.task("t")
    def add(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert add(1) == 3
    assert add.type == "t"
    assert (getattr(add, "__name__", None), add.__doc__) == ("add", "Adds.")
    assert repr(add).startswith("<task 't': <function ")
    assert app.types == ["t"]


def test_a_task_holds_the_arguments_by_name(app: App) -> None:
    @app.task("email:send", queue="mail", max_attempts=5)
    def send(to: str, subject: str = "Hello") -> None: ...

    wanted = Task("email:send", {"to": "a", "subject": "b"}, queue="mail", max_attempts=5)
    assert send.task(to="a", subject="b") == wanted
    assert send.task("a", "b") == wanted
    assert send.task("a", subject="b") == wanted
    # A default is the function's at the time it runs.
    assert send.task("a").payload == {"to": "a"}


def test_arguments_that_the_function_does_not_take(app: App) -> None:
    @app.task("t")
    def send(to: str, *, copy: bool = False) -> None: ...

    for args, kwargs in [((), {}), (("a", True), {}), ((), {"to": "a", "cc": "b"}), (("a",), {"to": "b"})]:
        with pytest.raises(TypeError):
            send.task(*args, **kwargs)  # type: ignore[arg-type]


def test_keywords_of_any_name(app: App) -> None:
    @app.task("t")
    def send(to: str, **fields: int) -> None: ...

    assert send.task("x", a=1).payload == {"to": "x", "a": 1}
    assert send.task(to="x", a=1).payload == {"to": "x", "a": 1}
    assert send.task(to="x").payload == {"to": "x"}
    with pytest.raises(TypeError):
        send.task(a=1)  # type: ignore[call-arg]


def test_a_function_without_parameters(app: App) -> None:
    @app.task("t")
    def tick() -> None: ...

    assert tick.task().payload == {}


def test_options_for_one_task(app: App) -> None:
    @app.task("t", queue="a", max_attempts=5)
    def send(to: str) -> None: ...

    at = datetime(2030, 1, 1, tzinfo=UTC)
    task = send.with_options(delay=timedelta(minutes=1), queue="b", idempotency_token="x", run_at=at).task("y")
    assert (task.delay, task.queue, task.idempotency_token, task.run_at, task.max_attempts) == (60, "b", "x", at, 5)
    assert send.task("y") == Task("t", {"to": "y"}, queue="a", max_attempts=5)
    assert send.with_options(queue="b").with_options(max_attempts=1).task("y").queue == "b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay is -1"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"queue": ""}, "queue has 0 characters"),
        ({"run_at": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001 - the point
        ({"weight": 1}, "unknown: weight; there are"),
    ],
)
def test_options_that_are_refused_where_they_are_given(app: App, options: dict[str, Any], message: str) -> None:
    @app.task("t")
    def send() -> None: ...

    with pytest.raises(SettingsError, match=message):
        send.with_options(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": ""}, "type has 0 characters"),
        ({"type": "x" * 256}, "type has 256 characters"),
        ({"type": "t", "queue": "x" * 256}, "queue has 256 characters"),
        ({"type": "t", "max_attempts": 0}, "max_attempts is 0"),
        ({"type": "t", "timeout": 0}, "timeout is 0"),
        ({"type": "t", "timeout": -1}, "timeout is -1"),
        ({"type": "t", "workers": 0}, "workers is 0"),
    ],
)
def test_a_decorator_refuses(app: App, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        app.task(**settings)


def test_a_type_has_one_function(app: App) -> None:
    def first() -> None: ...
    def second() -> None: ...

    app.task("t")(first)
    with pytest.raises(SettingsError, match=r"'t' has a function: <function .*first"):
        app.task("t")(second)


def test_the_bare_decorator_says_what_is_missing(app: App) -> None:
    with pytest.raises(SettingsError, match=r'@app.task\("send"\) above send'):

        @app.task  # type: ignore[arg-type]
        def send() -> None: ...


def test_parameters_without_a_name(app: App) -> None:
    def star(*args: int) -> None: ...
    def only(a: int, /) -> None: ...

    for function in (star, only):
        with pytest.raises(SettingsError, match="has no name to pass it by"):
            app.task("t")(function)
    assert app.types == []


def test_a_wrapped_function_is_bound_as_what_it_wraps(app: App) -> None:
    def plain(to: str) -> str:
        return to

    @app.task("t")
    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        return plain(*args, **kwargs)

    assert wrapper.task("x").payload == {"to": "x"}


def test_one_database_is_enough() -> None:
    with pytest.raises(SettingsError, match="dsn and embedded are both given"):
        App("host=x", embedded="./data")


def test_no_database_and_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"give App a dsn .* FASTQ_DSN.* extra `embedded`"):
        _ = App().dsn


def test_the_dsn_is_the_argument_else_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_DSN", "host=env")
    assert App("host=arg").dsn == "host=arg"
    assert App().dsn == "host=env"


def test_another_database_before_the_first_use(app: App) -> None:
    app.use(dsn="host=other", schema="mine")
    assert (app.dsn, app.schema) == ("host=other", "mine")
    with pytest.raises(SettingsError, match="in use"):
        app.use(dsn="host=third")
