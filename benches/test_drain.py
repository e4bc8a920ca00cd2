"""Claiming, running and completing what waits."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches.timing import time_rounds
from fastq import Consumer, Producer
from fastq.bench._handlers import Kind, Starts
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker
from fastq.bench._waiting import wait_for

_TASKS = 20_000


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_drain(benchmark: BenchmarkFixture, session: Session, producer: Producer, kind: Kind) -> None:
    maker = TaskMaker()
    starts = Starts()

    def load() -> tuple[tuple[Consumer], dict[str, object]]:
        producer.enqueue_many(maker.stream(_TASKS))
        return (session.consumer(starts.handler(kind)),), {}

    def drain(consumer: Consumer) -> None:
        consumer.start()
        wait_for("drain", lambda: consumer.stats()["completed"], _TASKS)

    def stop(consumer: Consumer) -> None:
        consumer.stop()

    time_rounds(benchmark, drain, setup=load, teardown=stop, rounds=8)
    assert len(starts.ids) == len(set(starts.ids)) == 9 * _TASKS
