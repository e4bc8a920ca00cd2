"""Memory of a worker through 2,000 tasks of 1 MiB, at most, over the same worker idle."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benches.support import MIB, answer, load, memory, read_ready, wait_completed, worker
from fastq import Client, Task
from fastq.bench._session import TYPE, Session
from fastq.bench._tasks import TaskMaker

_TASKS = 2_000
#: So that it has connected, and run something.
_FIRST = 1_000


def main() -> None:
    with Session() as session, Client(session.dsn, schema=session.name) as client, worker("noop", session) as process:
        read_ready(process)
        load(session, TaskMaker().stream(_FIRST))
        wait_completed(client, _FIRST, 60)
        idle = memory(process.pid)
        load(session, _tasks())
        wait_completed(client, _FIRST + _TASKS, 300)
        peak = memory(process.pid, peak=True)
    answer(over_idle_mib=(peak - idle) / MIB, idle_mib=idle / MIB)


def _tasks() -> Iterator[Task]:
    for _ in range(_TASKS):
        # Noise, which PostgreSQL can't compress.
        yield Task(TYPE, os.urandom(MIB))


if __name__ == "__main__":
    main()
