"""The processes of a chaos run: four workers and a producer of each kind. One that was killed is followed by another."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from tests.support.faults.journal import Journal
from tests.support.faults.processes import WorkerProcess
from tests.support.waiting import wait_until

WORKERS: Final = 4
KINDS: Final = ("single", "bulk", "token", "transaction")
#: Seconds until a failed attempt is repeated.
_RETRY: Final = 0.5


class Workers:
    """Worker processes for type ``t``, at their defaults; the handlers of every other one are coroutine functions.

    Args:
        dsn: of their database.
        schema: of fastq's tables.
        folder: for their logs.
        journal: where handlers write down what they do.
        number: how many.
        name: what their logs are called by, where others are in the folder.
        env: variables beside this process's own.
    """

    def __init__(
        self,
        dsn: str,
        schema: str,
        folder: Path,
        journal: Journal,
        *,
        number: int = WORKERS,
        name: str = "worker",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._env = name, env
        self._settings = {"dsn": dsn, "schema": schema}
        self._registered = sql.SQL("SELECT pid FROM {}.consumer").format(sql.Identifier(schema))
        self._folder, self._journal = folder, journal
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._free: list[WorkerProcess] = []
        self._async: set[int] = set()
        self.all: list[WorkerProcess] = []
        """Dead ones too."""
        for no in range(number):
            self._free.append(self._start(is_async=no % 2 == 1))

    def kill_one(self, rnd: random.Random) -> tuple[float, int]:
        """SIGKILL; another one of its kind takes its place. Gives when, and whom."""
        worker = self.take_one(rnd)
        at = worker.kill()
        self.put_back(self._start(is_async=worker.pid in self._async))
        return at, worker.pid

    def take_one(self, rnd: random.Random) -> WorkerProcess:
        """One that nothing else happens to until it is put back."""
        wait_until(lambda: self._free, timeout=60, message="a worker that nothing happens to")
        with self._lock:
            return self._free.pop(rnd.randrange(len(self._free)))

    def put_back(self, worker: WorkerProcess) -> None:
        """See `take_one`."""
        with self._lock:
            self._free.append(worker)

    def check(self) -> None:
        """All that were not killed are there: none ended by itself."""
        with self._lock:
            ended = [worker.pid for worker in self._free if worker.is_dead]
        assert not ended, f"workers ended by themselves: {ended}"

    def stop(self) -> None:
        """Ends them in order."""
        with self._lock:
            workers = list(self._free)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            status = worker.wait(60)
            assert status == 0, f"worker {worker.pid} ended with {status}"

    def close(self) -> None:
        """Ends them at once."""
        self._stack.close()

    def logs(self) -> str:
        """What all of them logged, without what is only of use to find a mistake."""
        lines = (line for worker in self.all for line in worker.log.splitlines() if not line.startswith("DEBUG"))
        return "\n".join(lines)

    def _start(self, *, is_async: bool) -> WorkerProcess:
        log = self._folder / f"{self._name}-{len(self.all) + 1}.log"
        worker = self._stack.enter_context(
            WorkerProcess(self._journal, log, self._settings, is_async=is_async, retry=_RETRY, env=self._env)
        )
        if is_async:
            self._async.add(worker.pid)
        self.all.append(worker)
        # Who starts is told at once of a server that is away, and ends.
        wait_until(lambda: worker.pid in self._pids(), timeout=60, message="a worker's registration")
        return worker

    def _pids(self) -> set[int]:
        with psycopg.connect(self._settings["dsn"], autocommit=True, connect_timeout=5) as db:
            return {pid for (pid,) in db.execute(self._registered)}


class Producers:
    """A process of each of `KINDS`; what they were told is in ``promises-*`` in `folder`.

    Args:
        dsn: of their database.
        schema: of fastq's tables.
        folder: for their logs and promises.
        seed: of their choices.
        kinds: those of `KINDS` that there are.
        is_varied: whether some of their tasks order effects, or have options of their own: workers of older versions know neither.
        env: variables beside this process's own.
    """

    def __init__(
        self,
        dsn: str,
        schema: str,
        folder: Path,
        seed: str,
        *,
        kinds: Sequence[str] = KINDS,
        is_varied: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._env = {**os.environ, **(env or {})}
        self._dsn, self._schema, self._folder, self._seed = dsn, schema, folder, seed
        self._is_varied = is_varied
        self._started = 0
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._lock = threading.Lock()
        for kind in kinds:
            self._start(kind)

    def kill_one(self, rnd: random.Random) -> tuple[float, int]:
        """SIGKILL; another of its kind takes its place. Gives when, and whom."""
        kind, process = self._running.pop(rnd.randrange(len(self._running)))
        at = time.monotonic()
        process.kill()
        process.wait(10)
        self._start(kind)
        return at, process.pid

    def note(self, word: str, ids: list[int]) -> None:
        """What this process itself was told."""
        with self._lock, (self._folder / "promises-here").open("a") as file:
            file.write(f"{word} {' '.join(map(str, ids))}\n")

    @property
    def files(self) -> list[Path]:
        """What all of them were told."""
        return sorted(self._folder.glob(f"promises-{self._seed}-*")) + sorted(self._folder.glob("promises-here"))

    def stop(self) -> None:
        """Ends them once their calls under way have returned."""
        for _, process in self._running:
            process.terminate()
        for kind, process in self._running:
            status = process.wait(90)
            # One that was just started may not have come to listen to it.
            assert status in (0, -signal.SIGTERM), f"the {kind} producer ended with {status}"

    def close(self) -> None:
        """Ends them at once."""
        for _, process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait(10)

    def _start(self, kind: str) -> None:
        self._started += 1
        spec = {
            "dsn": self._dsn,
            "schema": self._schema,
            "kind": kind,
            "is_varied": self._is_varied,
            "file": str(self._folder / f"promises-{self._seed}-{self._started}"),
            "seed": f"{self._seed} {self._started}",
        }
        program = Path(__file__).with_name("producer_main.py")
        with (self._folder / f"producer-{self._seed}-{self._started}.log").open("wb") as log:
            process = subprocess.Popen([sys.executable, str(program), json.dumps(spec)], stderr=log, env=self._env)
        self._running.append((kind, process))


__all__ = ["KINDS", "WORKERS", "Producers", "Workers"]
