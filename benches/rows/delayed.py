"""Tasks with delays of 1 to 10 s: how long after its time each starts.

A task's time is counted from before its enqueue was called, so that the lateness is never made smaller than it is.
"""

from __future__ import annotations

import random
import sys
import time

from benches.support import answer, wait_completed
from fastq import Client, Task, TaskInfo
from fastq.bench._session import TYPE, Session

_TASKS = 50


def main() -> None:
    started: dict[int, float] = {}
    due: dict[int, float] = {}

    def handle(task: TaskInfo) -> None:
        started[task.id] = time.monotonic()

    with Session() as session, Client(session.dsn, schema=session.name) as client:
        producer = session.producer()
        consumer = session.consumer(handle)
        consumer.start()
        for _ in range(_TASKS):
            delay = random.uniform(1, 10)
            called = time.monotonic()
            due[producer.enqueue(Task(TYPE, delay=delay)).id] = called + delay
        wait_completed(client, _TASKS, 60)
        consumer.stop()
    lateness = sorted(started[id_] - at for id_, at in due.items())
    if lateness[0] < 0:
        sys.exit(f"a task started {-lateness[0]:g} s before its time")
    answer(latest_s=lateness[-1], median_s=lateness[_TASKS // 2])


if __name__ == "__main__":
    main()
