"""What the measurements of the table share: loading tasks, workers in processes of their own, waiting for them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastq import Client, Producer, Task
from fastq.bench._processes import memory_bytes
from fastq.bench._session import TYPE, Session

MIB = 1024 * 1024


def load(session: Session, tasks: Iterable[Task]) -> None:
    """Enqueue them, committed every 10,000."""
    with Producer(session.dsn, schema=session.name) as producer:
        producer.enqueue_many(tasks, commit_every=10_000)


def wait_until(what: str, condition: Callable[[], bool], timeout: float) -> None:
    """Wait for it, or end with what did not happen."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.01)


def wait_completed(client: Client, tasks: int, timeout: float, *, type_: str = TYPE) -> None:
    """Wait until ``tasks`` of the type are completed, and end if there is one in another state."""

    def is_done() -> bool:
        return client.counts("type").get(type_, {}).get("completed", 0) >= tasks

    wait_until(f"{tasks:,} completed tasks", is_done, timeout)
    counts = {state: number for state, number in client.counts("type")[type_].items() if number}
    if counts != {"completed": tasks}:
        sys.exit(f"not {tasks:,} completed tasks, but {counts}")


@contextlib.contextmanager
def worker(module: str, session: Session, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``benches.workers.<module>``, terminated at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benches.workers.{module}", session.dsn, session.name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def read_ready(process: subprocess.Popen[str]) -> None:
    """Wait for the line that says that a worker has started."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "ready\n":
        sys.exit(f"a worker said {line!r} instead of ready")


def memory(process_id: int, *, peak: bool = False) -> int:
    """Bytes in RAM, now or at most so far. Linux alone tells."""
    found = memory_bytes(process_id, peak=peak)
    if found is None:
        sys.exit("memory is read from /proc, which is not here or does not show the process")
    return found


def answer(**figures: Any) -> None:
    """Print what was measured."""
    print(json.dumps(figures))
