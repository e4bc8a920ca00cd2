"""A producer process: ``producer_main.py DSN SCHEMA``. Prints what it takes for the time of day; then reads tasks, a JSON list of
objects a line, enqueues them, and prints their ids as a JSON list. Ends with its input."""

from __future__ import annotations

import json
import sys
import time

from fastq import Producer, Task


def main() -> None:
    """Enqueues what it reads."""
    dsn, schema = sys.argv[1:]
    sys.stdout.write(f"{time.time():f}\n")
    sys.stdout.flush()
    with Producer(dsn, schema=schema) as producer:
        for line in sys.stdin:
            results = producer.enqueue_many(Task(**task) for task in json.loads(line))
            sys.stdout.write(f"{json.dumps([result.id for result in results])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
