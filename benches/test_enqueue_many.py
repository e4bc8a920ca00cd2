"""Enqueueing in bulk."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches.timing import time_rounds
from fastq import Producer
from fastq.bench._tasks import TaskMaker

_TASKS = 20_000


@pytest.mark.parametrize("tokens", [False, True], ids=["plain", "tokens"])
def test_enqueue_many(benchmark: BenchmarkFixture, producer: Producer, *, tokens: bool) -> None:
    maker = TaskMaker(tokens=tokens)
    results = time_rounds(benchmark, lambda: producer.enqueue_many(maker.stream(_TASKS)), rounds=10)
    assert len(results) == _TASKS
    assert results[-1].is_new


def test_enqueue_many_in_commits(benchmark: BenchmarkFixture, producer: Producer) -> None:
    maker = TaskMaker()
    results = time_rounds(benchmark, lambda: producer.enqueue_many(maker.stream(_TASKS), commit_every=1_000), rounds=10)
    assert len(results) == _TASKS
