"""Enqueueing one task a call."""

from __future__ import annotations

import asyncio

from pytest_benchmark.fixture import BenchmarkFixture

from benches.timing import time_rounds
from fastq import Enqueued, Producer
from fastq.bench._tasks import TaskMaker

_COROUTINES = 64
_EACH = 50


def test_enqueue_alone(benchmark: BenchmarkFixture, producer: Producer) -> None:
    maker = TaskMaker()
    result = time_rounds(benchmark, lambda: producer.enqueue(maker.make()), rounds=200)
    assert result.is_new


def test_enqueue_from_coroutines(benchmark: BenchmarkFixture, producer: Producer) -> None:
    maker = TaskMaker()

    async def call() -> list[Enqueued]:
        return [await producer.aenqueue(maker.make()) for _ in range(_EACH)]

    async def call_all() -> list[list[Enqueued]]:
        return await asyncio.gather(*(call() for _ in range(_COROUTINES)))

    results = time_rounds(benchmark, lambda: asyncio.run(call_all()), rounds=10)
    assert len({result.id for call in results for result in call}) == _COROUTINES * _EACH
