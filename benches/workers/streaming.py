"""A producer that streams tasks from a generator: DSN SCHEMA TASKS. Prints its memory before, and at most."""

from __future__ import annotations

import json
import os
import sys

from benches.support import memory
from fastq import Producer
from fastq.bench._tasks import TaskMaker


def main() -> None:
    dsn, schema, tasks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    maker = TaskMaker()
    with Producer(dsn, schema=schema) as producer:
        # Connected, and everything imported.
        producer.enqueue_many(maker.stream(10_000), commit_every=10_000)
        idle = memory(os.getpid())
        results = producer.enqueue_many(maker.stream(tasks), commit_every=10_000)
        peak = memory(os.getpid(), peak=True)
    assert len(results) == tasks
    print(json.dumps({"idle": idle, "peak": peak}))


if __name__ == "__main__":
    main()
