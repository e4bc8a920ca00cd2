"""Completing alone: of tasks that all run and end at once."""

from __future__ import annotations

import threading

from pytest_benchmark.fixture import BenchmarkFixture

from benches.timing import time_rounds
from fastq import Consumer, Producer, TaskInfo
from fastq.bench._handlers import Starts
from fastq.bench._session import TYPE, Session
from fastq.bench._tasks import TaskMaker
from fastq.bench._waiting import wait_for

_TASKS = 200


def test_complete(benchmark: BenchmarkFixture, session: Session, producer: Producer) -> None:
    maker = TaskMaker()
    starts = Starts()
    gate = threading.Event()

    def hold(task: TaskInfo) -> None:
        starts.ids.append(task.id)
        gate.wait()

    consumer = Consumer(session.dsn, schema=session.name, concurrency=_TASKS)
    consumer.add_handler(TYPE, hold)
    session.stop_at_end(consumer)
    consumer.start()

    def start_all() -> None:
        gate.clear()
        started = len(starts.ids) + _TASKS
        producer.enqueue_many(maker.stream(_TASKS))
        wait_for("starts", lambda: len(starts.ids), started)

    def complete_all() -> None:
        gate.set()
        wait_for("completions", lambda: consumer.stats()["completed"], len(starts.ids))

    try:
        time_rounds(benchmark, complete_all, setup=start_all, rounds=20)
    finally:
        gate.set()
    assert len(starts.ids) == len(set(starts.ids)) == 21 * _TASKS
