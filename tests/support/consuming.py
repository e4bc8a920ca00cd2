"""Consumers for tests: short retries, and a look at what became of tasks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psycopg

from fastq import ConstantBackoff, Consumer
from tests.support.waiting import PATIENCE, wait_until

#: For retries that need not be waited for: promotion is looked for at least once in a `poll_interval`.
SOON = ConstantBackoff(0.0)


def new_consumer(dsn: str, schema: str, **settings: Any) -> Consumer:
    """A consumer that retries at once and looks around often."""
    settings.setdefault("retry_policy", SOON)
    settings.setdefault("poll_interval", 0.2)
    settings.setdefault("stop_timeout", 10)
    return Consumer(dsn, schema=schema, **settings)


def states(db: psycopg.Connection) -> dict[str, int]:
    """How many tasks are in each state, without those that none is in."""
    rows = db.execute("SELECT state, count(*) FROM tasks GROUP BY state").fetchall()
    return dict(rows)


def wait_for_states(db: psycopg.Connection, wanted: dict[str, int], *, timeout: float = PATIENCE) -> None:
    """Wait until the tasks are in these states."""
    wait_until(lambda: states(db) == wanted, timeout=timeout, message=f"tasks in the states {wanted}")


def errors(db: psycopg.Connection) -> list[tuple[int, str, str]]:
    """The failed attempts: attempt, error, traceback."""
    return db.execute("SELECT attempt, error, traceback FROM attempt_error ORDER BY id, attempt").fetchall()


def start_python(code: str, **options: Any) -> subprocess.Popen[str]:
    """Another Python with this code; its output is read through pipes."""
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


def run_python(code: str, *, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Another Python with this code, to its end."""
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=timeout, check=False)


Started = Callable[..., Consumer]
