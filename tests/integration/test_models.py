"""Models on their way from an enqueue to a handler; what does not fit fails at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import psycopg
import pydantic
import pytest

from fastq import App, Client, Producer, Task, TaskInfo
from tests.support.consuming import errors, new_consumer, wait_for_states


@dataclass
class Order:
    id: int
    items: list[str]


class Bill(pydantic.BaseModel):
    total: float


class Note(msgspec.Struct):
    text: str


@pytest.fixture
def app(dsn: str, migrated: str) -> Iterator[App]:
    app = App(dsn, schema=migrated)
    yield app
    app.producer.close()


def test_functions_get_instances(app: App, db: psycopg.Connection) -> None:
    seen: list[Any] = []

    @app.task("ship")
    def ship(order: Order, bill: Bill | None, notes: list[Note], plain: dict[str, int], **more: Note) -> None:
        seen.append((order, bill, notes, plain, more))

    @app.task("aship")
    async def aship(order: Order, bill: Bill | None = None) -> None:
        seen.append((order, bill))

    order, bill, note = Order(1, ["a"]), Bill(total=2.5), Note("n")
    ship.enqueue(order, bill, [note], {"n": 1}, extra=note)
    wait = app.consumer(poll_interval=0.2)
    with wait:
        wait_for_states(db, {"completed": 1})
        app.producer.enqueue_many([aship.task(order=order, bill=bill), aship.task(order)])
        wait_for_states(db, {"completed": 3})
    assert seen[0] == (order, bill, [note], {"n": 1}, {"extra": note})
    assert sorted(seen[1:], key=repr) == sorted([(order, bill), (order, None)], key=repr)


def test_a_handler_asks_for_a_model(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    consumer = new_consumer(dsn, migrated)
    seen: list[Any] = []

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        kind = {"id": Order, "total": Bill, "text": Note}[next(iter(task.payload))]
        seen.append(task.payload_as(kind))

    models = [Order(1, []), Bill(total=1.0), Note("x")]
    with Producer(dsn, schema=migrated) as producer, psycopg.connect(dsn) as connection:
        producer.enqueue(Task("t", models[0]))
        producer.enqueue_many([Task("t", models[1])])
        producer.enqueue_tx(connection, Task("t", models[2]))
    with consumer:
        wait_for_states(db, {"completed": 3})
    assert sorted(map(repr, seen)) == sorted(map(repr, models))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (
            {"order": {"id": "secret", "items": []}},
            "SkipRetry: the payload's order does not fit Order: id: an int is wanted, not str",
        ),
        (
            {"order": {"id": 1, "items": []}, "bill": {}},
            "SkipRetry: the payload's bill does not fit Bill: total: Field required",
        ),
        ({}, "SkipRetry: the payload does not fit the function's parameters: missing a required argument: 'order'"),
        (
            {"order": {"id": 1, "items": []}, "no": 1},
            "SkipRetry: the payload does not fit the function's parameters: got an unexpected",
        ),
        ([1], "SkipRetry: the payload is list, but the function takes fields: (order: "),
        (b"raw", "SkipRetry: the payload is bytes, but the function takes fields: (order: "),
    ],
)
def test_what_does_not_fit_fails_at_once(app: App, db: psycopg.Connection, payload: Any, reason: str) -> None:
    @app.task("sync")
    def sync(order: Order, bill: Bill = Bill(total=0)) -> None:  # noqa: B008
        raise AssertionError("it was called")

    @app.task("async")
    async def not_sync(order: Order, bill: Bill = Bill(total=0)) -> None:  # noqa: B008
        raise AssertionError("it was called")

    app.producer.enqueue_many([Task("sync", payload), Task("async", payload)])
    with app.consumer(poll_interval=0.2):
        wait_for_states(db, {"failed": 2})
    found = errors(db)
    assert [attempt for attempt, _, _ in found] == [1, 1]
    for _, error, traceback in found:
        assert error.startswith(reason)
        assert "secret" not in error + traceback


def test_fields_that_a_plain_function_does_not_take_fail_at_once(app: App, db: psycopg.Connection) -> None:
    @app.task("t")
    def add(a: int, b: int = 0) -> None:
        raise TypeError("the function's own")

    app.producer.enqueue_many([Task("t", {"a": 1}, max_attempts=2), Task("t", {"c": 1}), Task("t", None)])
    with app.consumer(poll_interval=0.2, retry_policy=lambda _task, _error: 0.0):
        wait_for_states(db, {"failed": 3})
    assert [(attempt, error.split(":")[0]) for attempt, error, _ in errors(db)] == [
        (1, "TypeError"),
        (2, "TypeError"),
        (1, "SkipRetry"),
        (1, "SkipRetry"),
    ]


@pytest.mark.parametrize("model", [Order, Bill, Note])
def test_raw_bytes_are_no_model(dsn: str, migrated: str, db: psycopg.Connection, model: type[Any]) -> None:
    consumer = new_consumer(dsn, migrated)

    @consumer.handler("t")
    def handle(task: TaskInfo) -> None:
        task.payload_as(model)

    with Producer(dsn, schema=migrated) as producer:
        producer.enqueue(Task("t", b"raw"))
    with consumer:
        wait_for_states(db, {"failed": 1})
    [(attempt, error, _)] = errors(db)
    assert attempt == 1
    assert error.startswith(f"SkipRetry: the payload does not fit {model.__name__}: ")


def test_a_client_sees_and_edits_models(app: App, dsn: str, migrated: str) -> None:
    id_ = app.producer.enqueue(Task("t", Order(1, ["a"]))).id
    with Client(dsn, schema=migrated) as client:
        assert client.get_task(id_).payload == {"id": 1, "items": ["a"]}
        assert client.edit_task(id_, payload=Note("x")).payload == {"text": "x"}
