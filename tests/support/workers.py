"""Worker processes that tests kill, stop and let go on, and what their handlers wrote down before that."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

_PROGRAM = """
import ctypes, fcntl, json, logging, os, signal, sys
import fastq
settings = json.loads(sys.argv[1])
logging.basicConfig(level="DEBUG", filename=sys.argv[2], format="%(levelname)s %(name)s: %(message)s")
journal = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(word, task):
    os.write(journal, f"{word} {task.id} {task.attempt} {os.getpid()}\\n".encode())

def handle(task):
    note("start", task)
    orders = task.payload or {}
    if "kill" in orders:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hold_lock_ms" in orders:
        # poll(2) called as a function that keeps the interpreter's lock.
        ctypes.PyDLL(None).poll(None, 0, orders["hold_lock_ms"])
    if "gate" in orders:
        with open(orders["gate"]) as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
    note("end", task)

consumer = fastq.Consumer(retry_policy=fastq.ConstantBackoff(0.0), **settings)
consumer.handler("t")(handle)
consumer.run()
"""


class Entry(NamedTuple):
    """What a handler wrote down."""

    word: str
    """``start`` or ``end``."""
    id: int
    attempt: int
    pid: int


class Journal:
    """What handlers in worker processes did, in order; nothing of it is lost with a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def entries(self, word: str, *, pid: int | None = None) -> list[Entry]:
        """Those of this word, of one process or all."""
        lines = (line.split() for line in self.path.read_text().splitlines())
        found = [Entry(line[0], int(line[1]), int(line[2]), int(line[3])) for line in lines]
        return [entry for entry in found if entry.word == word and pid in (None, entry.pid)]

    def started(self, *, pid: int | None = None) -> list[int]:
        """The ids of tasks in the order in which they started."""
        return [entry.id for entry in self.entries("start", pid=pid)]


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


class WorkerProcess:
    """A process with a consumer for tasks of type ``t``, whose payloads say what happens to them.

    ``{"kill": 1}`` kills the process, ``{"gate": path}`` waits at a `Gate`, ``{"hold_lock_ms": n}`` keeps the interpreter's
    lock for so long; any other task just ends.
    """

    def __init__(self, journal: Journal, log: Path, settings: dict[str, Any]) -> None:
        self._log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(settings), str(log), str(journal.path)],
            stdin=subprocess.DEVNULL,
        )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        """All that it logged."""
        return self._log.read_text()

    @property
    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def freeze(self) -> None:
        """Stops it in its tracks; returns once it stands."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def thaw(self) -> None:
        """Lets it go on."""
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
