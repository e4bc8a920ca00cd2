"""Every public call with values of wrong types and out of range: a clear error or a right answer, and no partial write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastq import (
    App,
    Client,
    ConstantBackoff,
    Consumer,
    Depends,
    ExponentialBackoff,
    Producer,
    Retention,
    SkipRetry,
    Snooze,
    SnoozeWithError,
    Task,
)
from fastq.consumer import CONCURRENCY
from fastq.settings import ClientSettings, ConsumerSettings, ProducerSettings
from tests.support import junk
from tests.support.consuming import states

_DSN = "host=127.0.0.1 port=1 user=nobody dbname=nothing connect_timeout=1"
_LATER = datetime(2100, 1, 1, tzinfo=UTC)


def _handler(_: object) -> None: ...


def _names(call: Callable[..., object], *, without: tuple[str, ...] = ()) -> list[str]:
    """Its parameters."""
    return [
        name
        for name, one in inspect.signature(call).parameters.items()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and name not in ("self", *without)
    ]


def _options(settings_of: type, *, without: tuple[str, ...] = ()) -> list[str]:
    return [name for name in settings_of.__dataclass_fields__ if name not in ("dsn", "schema", *without)]  # type: ignore[attr-defined]


_TASK = {
    "type": "t",
    "payload": 1,
    "idempotency_token": "token",
    "token_scope": "type",
    "token_until": "removed",
    "token_ttl": 60,
    "on_conflict": "existing",
    "priority": 3,
    "expires_at": _LATER,
    "timeout": 60,
    "retry": ConstantBackoff(1),
}
#: What can be made without a database: the call, a right base, and the parameters that are tried.
_MADE: dict[str, tuple[Callable[..., object], dict[str, Any], list[str]]] = {
    "Task": (Task, _TASK, sorted({*_names(Task), *_TASK})),
    "ExponentialBackoff": (ExponentialBackoff, {}, _names(ExponentialBackoff)),
    "ConstantBackoff": (ConstantBackoff, {"seconds": 1}, ["seconds"]),
    "Retention": (Retention, {}, _names(Retention)),
    "Snooze": (Snooze, {}, _names(Snooze)),
    "SnoozeWithError": (SnoozeWithError, {}, _names(SnoozeWithError)),
    "SkipRetry": (SkipRetry, {}, []),
    "Depends": (Depends, {}, ["factory"]),
    "Consumer": (
        Consumer,
        {"dsn": _DSN},
        sorted({*_names(Consumer), *_options(ConsumerSettings, without=("types",))} - {"dsn"}),
    ),
    "Consumer.handler": (
        lambda **given: Consumer(_DSN).handler(**given)(_handler),
        {"type": "t"},
        _names(Consumer.handler),
    ),
    "Consumer.add_handler": (
        lambda **given: Consumer(_DSN).add_handler(**given),
        {"type": "t", "function": _handler},
        _names(Consumer.add_handler, without=("is_async",)),
    ),
    "Consumer.use": (lambda **given: Consumer(_DSN).use(**given), {}, ["middleware"]),
    "Producer": (Producer, {"dsn": _DSN}, sorted({*_names(Producer), *_options(ProducerSettings)} - {"dsn"})),
    "Client": (Client, {"dsn": _DSN}, sorted({*_names(Client), *_options(ClientSettings)} - {"dsn"})),
    "App": (App, {"dsn": _DSN}, _names(App, without=("dsn", "embedded"))),
    "App.task": (lambda **given: App(_DSN).task(**given)(_handler), {"type": "t"}, _names(App.task)),
    "App.consumer": (
        lambda **given: _app().consumer(**given),
        {"concurrency": CONCURRENCY},
        ["queues", "concurrency", "retry_policy", "error_hook", "stop_timeout", "traceback_limit", "result_ttl"],
    ),
    "with_options": (
        lambda **given: _app().task("u")(_handler).with_options(**given),
        {},
        [
            *("queue", "priority", "delay", "run_at", "max_attempts", "expires_at", "idempotency_token", "token_ttl"),
            *("timeout", "retry"),
        ],
    ),
}


def _app() -> App:
    app = App(_DSN)
    app.task("t")(_handler)
    return app


def _try(call: Callable[..., object], base: dict[str, Any], wrong: dict[str, Any]) -> Exception | None:
    """What it raises; it must be clear, and say something."""
    try:
        call(**(base | wrong))
    except junk.CLEAR as raised:
        error = raised
    else:
        return None
    assert str(error)
    return error


@pytest.mark.parametrize("name", [name for name, (_, _, names) in _MADE.items() if names])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_made_without_a_database(name: str, data: st.DataObject) -> None:
    call, base, names = _MADE[name]
    wrong = data.draw(st.dictionaries(st.sampled_from(names), junk.values, min_size=1, max_size=2))
    _try(call, base, wrong)


@pytest.mark.parametrize("name", [name for name, (_, _, names) in _MADE.items() if names])
def test_each_parameter_with_each_odd_value(name: str) -> None:
    call, base, names = _MADE[name]
    for parameter in names:
        for value in junk.ODD:
            _try(call, base, {parameter: value})


# --- with a database -------------------------------------------------------------------------------


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def waiting(producer: Producer, db: psycopg.Connection) -> None:
    """Three tasks, with ids that nobody guesses."""
    db.execute("ALTER SEQUENCE task_id RESTART WITH 123456789001")
    producer.enqueue_many(Task("t", n) for n in range(3))


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.mark.parametrize(
    "name",
    ["type", "queue", "payload", "max_attempts", "priority", "delay", "run_at", "expires_at", "timeout", "retry"],
)
def test_what_was_put_into_a_task_since(producer: Producer, db: psycopg.Connection, name: str) -> None:
    """Its attributes are the user's: the engine looks at them again."""
    there = 0
    for value in junk.ODD:
        wrong = Task("t", 1)
        setattr(wrong, name, value)
        many = [Task("t", n) for n in range(3)]
        if _try(producer.enqueue, {}, {"task": wrong}) is None:
            there += 1
        # A bulk load is all or nothing.
        if _try(producer.enqueue_many, {}, {"tasks": [*many, wrong, *many]}) is None:
            there += 7
    assert sum(states(db).values()) == there
    producer.enqueue(Task("t"))


_CALLS: dict[str, dict[str, Any]] = {
    "get_task": {"id": 1},
    "wait": {"id": 1, "timeout": 0},
    "list_tasks": {},
    "counts": {},
    "cancel_task": {"id": 1},
    "retry_task": {"id": 1},
    "delete_task": {"id": 1},
    "edit_task": {"id": 1, "payload": 2},
    "count_tasks": {"states": ["failed"]},
    "cancel_tasks": {"states": ["failed"], "types": ["none"]},
    "retry_tasks": {"states": ["failed"], "types": ["none"]},
    "delete_tasks": {"states": ["failed"], "types": ["none"]},
    "edit_tasks": {"states": ["failed"], "types": ["none"], "payload": 2},
}
_FILTERS = ("states", "types", "queues", "ids")


def _tried(name: str, call: Callable[..., object]) -> list[str]:
    """The parameters of a client's call. A right timeout would be waited for."""
    if name == "wait":
        return ["id", "poll_interval"]
    return _names(call) + (list(_FILTERS) if name.endswith("_tasks") and name != "list_tasks" else [])


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("name", _CALLS)
@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_calls_of_the_client(client: Client, db: psycopg.Connection, name: str, data: st.DataObject) -> None:
    call, base = getattr(client, name), _CALLS[name]
    wrong = data.draw(st.dictionaries(st.sampled_from(_tried(name, call)), junk.values, min_size=1, max_size=2))
    try:
        _try(call, base, wrong)
    except TimeoutError:
        assert name == "wait"
    assert states(db) == {"pending": 3}, "no such filter means them, and no such id is theirs"


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("name", _CALLS)
def test_calls_of_the_client_with_each_odd_value(client: Client, db: psycopg.Connection, name: str) -> None:
    call, base = getattr(client, name), _CALLS[name]
    for parameter in _tried(name, call):
        for value in junk.ODD:
            try:
                _try(call, base, {parameter: value})
            except TimeoutError:
                assert name == "wait"
    assert states(db) == {"pending": 3}


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), 10**400, "10", b"1", [], True, object()])
def test_a_wait_that_would_never_end_as_meant(client: Client, timeout: Any) -> None:
    with pytest.raises(junk.CLEAR):
        client.wait(1, timeout)
