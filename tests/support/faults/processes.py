"""Whole processes that tests kill, stop, let go on and end in order: workers, whose tasks say what happens to them, and producers."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.support.faults.journal import Journal
from tests.support.waiting import wait_until

_FOLDER: Final = Path(__file__).parent


class Gate:
    """Handlers in other processes wait at it, those that come later too, until it is opened. A task names it in its payload."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    @property
    def orders(self) -> dict[str, str]:
        """The payload of a task that waits here."""
        return {"gate": str(self.path)}

    def open(self) -> None:
        """All go through."""
        self._file.close()


class _Process:
    """A child that may be killed, stopped and let go on. Killed at the latest when its ``with`` is left."""

    def __init__(self, program: str, *args: str, env: Mapping[str, str] | None = None, **options: Any) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, str(_FOLDER / program), *args],
            text=True,
            env={**os.environ, **(env or {})},
            **{"stdin": subprocess.DEVNULL, **options},
        )
        self.pid = self.process.pid

    @property
    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def kill(self) -> float:
        """Ends it with SIGKILL. Gives when that was sent, by the monotonic clock."""
        at = time.monotonic()
        self.process.kill()
        self.process.wait(10)
        return at

    def terminate(self) -> None:
        """Asks it to stop in order; a second time, at once."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 60.0) -> int:
        """Waits for its end. Gives its exit status."""
        return self.process.wait(timeout)

    def freeze(self) -> float:
        """Stops it in its tracks; returns once all of it stands. Gives when, by the monotonic clock."""
        self.process.send_signal(signal.SIGSTOP)
        return self.wait_until_frozen()

    def wait_until_frozen(self) -> float:
        """Waits until it stands, whoever stopped it. Gives when, by the monotonic clock."""
        # Only this kind of news is taken: its end is left to `process`.
        news = os.WSTOPPED | os.WNOHANG
        wait_until(
            lambda: os.waitid(os.P_PID, self.pid, news), timeout=20, message=f"process {self.pid} to stand still"
        )
        return time.monotonic()

    def thaw(self) -> float:
        """Lets it go on. Gives when, by the monotonic clock."""
        at = time.monotonic()
        self.process.send_signal(signal.SIGCONT)
        return at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class WorkerProcess(_Process):
    """A process with a consumer, whose tasks' payloads say what happens to them (`worker_main`).

    Args:
        journal: where its handlers write down what they do.
        log: the file that it logs to, at level DEBUG.
        settings: those of its consumer, dsn and schema among them.
        types: what it has handlers for, and how many of each may run at once (None: no limit); default: ``t``.
        is_async: whether its handlers are coroutine functions.
        retry: seconds until a failed attempt is repeated; None: as the consumer's default policy says.
        switch_interval: seconds after which a thread must let another have the interpreter; None: Python's default.
        env: variables beside this process's own.
    """

    def __init__(
        self,
        journal: Journal,
        log: Path,
        settings: Mapping[str, Any],
        *,
        types: Mapping[str, int | None] | None = None,
        is_async: bool = False,
        retry: float | None = None,
        switch_interval: float | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        spec = {
            "journal": str(journal.path),
            "log": str(log),
            "settings": dict(settings),
            "types": {"t": None} if types is None else dict(types),
            "is_async": is_async,
            "retry": retry,
            "switch_interval": switch_interval,
        }
        super().__init__("worker_main.py", json.dumps(spec), env=env)

    @property
    def log(self) -> str:
        """All that it logged."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def wall_clock(self) -> float:
        """What it took for the time of day when it began."""
        found = wait_until(lambda: re.findall(r"wall clock (\S+)", self.log), message="the worker's clock")
        return float(found[0])

    @property
    def stats(self) -> dict[str, float]:
        """Its consumer's counters; known once it has ended in order."""
        found = re.search(r"worker: stats (.*)", self.log)
        assert found, f"process {self.pid} did not end in order"
        counted: dict[str, float] = json.loads(found[1])
        return counted


class ProducerProcess(_Process):
    """A process with a producer.

    Args:
        dsn: of its database.
        schema: of fastq's tables.
        env: variables beside this process's own.
    """

    def __init__(self, dsn: str, schema: str, *, env: Mapping[str, str] | None = None) -> None:
        super().__init__("producer_main.py", dsn, schema, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.wall_clock = float(self._read())
        """What it took for the time of day when it began."""

    def enqueue(self, *tasks: Mapping[str, Any]) -> list[int]:
        """Tasks by the arguments of `fastq.Task`. Gives their ids."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(tasks)}\n")
        self.process.stdin.flush()
        ids: list[int] = json.loads(self._read())
        return ids

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the producer process ended"
        return line
