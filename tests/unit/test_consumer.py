"""Consumer: what it refuses before any database is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastq import Consumer, ConsumerError, SettingsError, TaskInfo


def _consumer(**settings: Any) -> Consumer:
    return Consumer("host=nowhere connect_timeout=1", **settings)


def _handle(task: TaskInfo) -> None: ...


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 1.5}, "concurrency is 1.5"),
        ({"queues": "mail"}, "queues is 'mail', but must be a list"),
        ({"queues": {"mail": 3}}, "queues is .* but must be a list"),
        ({"queues": []}, "queues is empty"),
        ({"queues": [""]}, "a queue has 0 characters"),
        ({"queues": ["x" * 256]}, "a queue has 256 characters"),
        ({"retry_policy": 5}, "retry_policy is 5, but must be a function"),
        ({"error_hook": 5}, "error_hook is 5, but must be a function"),
        ({"stop_timeout": -1}, "stop_timeout is -1"),
        ({"traceback_limit": 0}, "traceback_limit is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"poll": 1}, "unknown setting poll"),
        ({"schema": ""}, "schema"),
        ({"schema": "x" * 64}, "schema"),
        ({"schema": "pg_mine"}, "schema"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        _consumer(**settings)


def test_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    with pytest.raises(SettingsError, match="no database is named"):
        Consumer()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": ""}, "type has 0 characters"),
        ({"type": "x" * 256}, "type has 256 characters"),
        ({"type": "a\0b"}, "NUL"),
        ({"type": "t", "workers": 0}, "workers is 0"),
        ({"type": "t", "timeout": 0}, "timeout is 0"),
        ({"type": "t", "timeout": "5"}, "timeout is '5'"),
    ],
)
def test_registrations_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        _consumer().handler(**settings)(_handle)


def test_a_type_has_one_handler() -> None:
    consumer = _consumer()
    consumer.handler("t")(_handle)
    with pytest.raises(SettingsError, match="'t' has a handler: <function _handle"):
        consumer.handler("t")(_handle)


def test_handlers_that_would_run_nothing() -> None:
    def generator(task: TaskInfo) -> Iterator[int]:
        yield task.id

    async def async_generator(task: TaskInfo) -> AsyncIterator[int]:
        yield task.id

    for handler in (generator, async_generator):
        with pytest.raises(SettingsError, match="generator"):
            _consumer().handler("t")(handler)
    with pytest.raises(SettingsError, match="must be callable"):
        _consumer().add_handler("t", "print")  # type: ignore[arg-type]


def test_a_decorated_handler_stays_what_it_is() -> None:
    assert _consumer().handler("t")(_handle) is _handle


def test_no_handlers() -> None:
    with pytest.raises(ConsumerError, match="no handlers"):
        _consumer().start()
    with pytest.raises(ConsumerError, match="no handlers"):
        asyncio.run(_consumer().arun())


def test_a_stop_without_a_start() -> None:
    with pytest.raises(ConsumerError, match="never started"):
        _consumer().stop()
    with pytest.raises(ConsumerError, match="never started"):
        _consumer().stats()


def test_sync_calls_where_a_loop_runs() -> None:
    consumer = _consumer()
    consumer.handler("t")(_handle)

    async def main() -> None:
        for call, instead in ((consumer.start, "async with consumer"), (consumer.run, "await consumer.arun")):
            with pytest.raises(ConsumerError, match=f"event loop runs.*{instead}"):
                call()

    asyncio.run(main())
