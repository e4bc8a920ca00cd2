"""A slow type at its ``workers`` limit with 100,000 waiting, beside a fast type.

What counts is the fast one's rate, as a share of that alone with as many free slots.
"""

from __future__ import annotations

import time

from benches.support import answer, load, wait_completed
from fastq import Client, Consumer, Task, TaskInfo
from fastq.bench._handlers import Starts
from fastq.bench._session import TYPE, Session
from fastq.bench._tasks import TaskMaker
from fastq.bench._waiting import wait_for

_SLOW = "bench:slow"
_SLOW_TASKS = 100_000
#: Its handlers sleep so long.
_SLOW_SECONDS = 0.25
_SLOTS = 32
_SLOW_WORKERS = 8
#: Tasks of the fast type: some seconds' worth.
_NOOP_TASKS = 500_000
_WORK_TASKS = 100_000
_WORK_SECONDS = 0.001


def main() -> None:
    noop_alone, noop_beside = _rate(_NOOP_TASKS, 0, beside=False), _rate(_NOOP_TASKS, 0, beside=True)
    work_alone = _rate(_WORK_TASKS, _WORK_SECONDS, beside=False)
    work_beside = _rate(_WORK_TASKS, _WORK_SECONDS, beside=True)
    answer(
        noop_alone_per_s=noop_alone,
        noop_beside_per_s=noop_beside,
        noop_of_alone=noop_beside / noop_alone,
        work_alone_per_s=work_alone,
        work_beside_per_s=work_beside,
        work_of_alone=work_beside / work_alone,
    )


def _rate(tasks: int, work: float, *, beside: bool) -> float:
    """Fast tasks started a second, from the consumer's start to the last one's."""
    starts = Starts()
    with Session() as session, Client(session.dsn, schema=session.name) as client:
        load(session, TaskMaker().stream(tasks))
        if beside:
            load(session, (Task(_SLOW, {"n": number}) for number in range(_SLOW_TASKS)))
        consumer = Consumer(session.dsn, schema=session.name, concurrency=_SLOTS if beside else _SLOTS - _SLOW_WORKERS)
        consumer.add_handler(TYPE, starts.handler("sync", work))
        if beside:
            consumer.add_handler(_SLOW, _sleep, workers=_SLOW_WORKERS)
        session.stop_at_end(consumer)
        began = time.perf_counter()
        consumer.start()
        ended = wait_for("the fast type", lambda: len(starts.ids), tasks)
        wait_completed(client, tasks, 60)
        consumer.stop()
        return tasks / (ended - began)


def _sleep(_task: TaskInfo) -> None:
    time.sleep(_SLOW_SECONDS)


if __name__ == "__main__":
    main()
