"""The fastq processes of the demo: the same command line that a user types."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastq.errors import FastqError

#: What the workers run.
APP: Final = "fastq.demo.tasks:app"
#: Seconds that a worker has for a stop in order.
_STOP: Final = 30.0


class DemoError(FastqError):
    """The demo could not go on: the message says what failed."""


def enqueue(path: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """``fastq enqueue --file path --json``, with its progress bar on this terminal. Returns what it answered.

    Raises:
        DemoError: it ended with another exit status than 0.
    """
    done = subprocess.run(  # noqa: S603 - our own program
        [*_fastq(), "enqueue", "--file", str(path), "--json"],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **env},
    )
    if done.returncode != 0:
        raise DemoError(f"fastq enqueue --file {path} ended with exit status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Worker:
    """A process of ``fastq worker``. It ends with this process at the latest: see ``fastq.demo.tasks``.

    Args:
        number: what the demo calls it.
        log: the file for what it says.
        env: added to the environment.
    """

    def __init__(self, number: int, log: Path, env: Mapping[str, str]) -> None:
        self.number = number
        self._log = log
        with log.open("xb") as file:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*_fastq(), "worker", APP],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                # Ctrl-C is for the demo, which then stops its workers.
                start_new_session=True,
            )
        self.pid = self._process.pid

    def check(self) -> None:
        """That it runs.

        Raises:
            DemoError: it has ended.
        """
        if self._process.poll() is not None:
            raise DemoError(self._describe_end())

    def kill(self) -> None:
        """SIGKILL: it gets no chance to say anything to anybody."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._close()

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended in order.

        Raises:
            DemoError: it ended otherwise, or did not end in time and was killed.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DemoError(f"worker {self.number} did not stop within {_STOP:g} s\n{self._tail()}") from None
        self._close()
        # By the signal itself: it was still starting, where the other one had done all meanwhile, and held nothing.
        if self._process.returncode not in (0, -signal.SIGTERM):
            raise DemoError(self._describe_end())

    def give_up(self) -> None:
        """Kill it, unless it has been stopped or killed before."""
        if self._process.returncode is None:
            self.kill()

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _describe_end(self) -> str:
        return f"worker {self.number} ended with exit status {self._process.returncode}\n{self._tail()}"

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-20:])


def _fastq() -> list[str]:
    return [sys.executable, "-m", "fastq"]


__all__ = ["APP", "DemoError", "Worker", "enqueue"]
