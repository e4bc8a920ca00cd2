"""A worker whose handlers do nothing: DSN SCHEMA. Until SIGTERM."""

from __future__ import annotations

import sys

from fastq import Consumer, TaskInfo
from fastq.bench._session import TYPE


def _handle(task: TaskInfo) -> None:
    # A handler looks at what it got.
    assert task.payload is not None


def main() -> None:
    dsn, schema = sys.argv[1:]
    consumer = Consumer(dsn, schema=schema)
    consumer.add_handler(TYPE, _handle)
    print("ready", flush=True)
    consumer.run()


if __name__ == "__main__":
    main()
