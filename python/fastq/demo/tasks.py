"""The demo's app: three handlers, each of which writes down its runs. ``fastq worker fastq.demo.tasks:app`` runs them.

Where the run log and the loopback service are, the demo says in the environment.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Final

from fastq.app import App
from fastq.demo.runlog import RunLog
from fastq.demo.service import BUSY
from fastq.retry import ConstantBackoff

#: The environment's names for: the folder of the run logs, the runs that each holds, and the service's host and port.
FOLDER: Final = "FASTQ_DEMO_FOLDER"
SLOTS: Final = "FASTQ_DEMO_SLOTS"
SERVICE: Final = "FASTQ_DEMO_SERVICE"

#: Seconds between two attempts: short, so that the demo ends soon.
BACKOFF: Final = 0.5

app = App(retry_policy=ConstantBackoff(BACKOFF))


class ServiceBusyError(Exception):
    """The service could not serve now."""


def fingerprint(text: str) -> int:
    """What a handler finds in a text, so that the audit can tell whether it had the right one: 64 bits."""
    words = " ".join(sorted(text.lower().split()))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8])


@app.task("text:digest")
def digest(line: int, text: str) -> None:
    """Sync, and light on the CPU."""
    with _run_log().record(line) as run:
        run.result = fingerprint(text)


@app.task("net:echo")
async def echo(line: int, text: str) -> None:
    """Async: waits for the service to send the text back."""
    with _run_log().record(line) as run:
        run.result = fingerprint(await _echo(text))


@app.task("mail:deliver")
def deliver(line: int, to: str, failures: int) -> None:
    """Sync, and fails as often as the service is busy."""
    with _run_log().record(line) as run:
        answer = _deliver(f"deliver {line} {failures}\n".encode())
        if answer == BUSY:
            raise ServiceBusyError(f"the service is busy, the mail to {to} has to wait")
        run.result = fingerprint(to)


@cache
def _run_log() -> RunLog:
    return RunLog(Path(os.environ[FOLDER]), int(os.environ[SLOTS]))


def _address() -> tuple[str, int]:
    host, _, port = os.environ[SERVICE].rpartition(":")
    return host, int(port)


# Connections that no echo uses now: a worker's async handlers run on one loop.
_idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []


async def _echo(text: str) -> str:
    reader, writer = _idle.pop() if _idle else await asyncio.open_connection(*_address())
    writer.write(f"echo {text}\n".encode())
    answer = await reader.readline()
    if not answer.endswith(b"\n"):
        raise ConnectionError("the service has gone")
    _idle.append((reader, writer))
    return answer[:-1].decode()


_thread = threading.local()


def _deliver(request: bytes) -> bytes:
    connection: socket.socket | None = getattr(_thread, "connection", None)
    if connection is None:
        connection = _thread.connection = socket.create_connection(_address(), timeout=10)
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"\n"):
        received = connection.recv(1024)
        if not received:
            raise ConnectionError("the service has gone")
        answer += received
    return answer[:-1]


def _end_with_the_demo() -> None:
    """The demo holds the other end of standard input: when it is gone, however it ended, so is its worker."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if FOLDER in os.environ:
    threading.Thread(target=_end_with_the_demo, name="fastq-demo-watch", daemon=True).start()


__all__ = ["FOLDER", "SERVICE", "SLOTS", "app", "fingerprint"]
