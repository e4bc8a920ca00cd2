"""What the keeper says of the server, and whether that is so."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import struct
from pathlib import Path
from typing import Literal

from fastq.embedded._files import Folder

State = Literal["starting", "ready", "failed", "stopped"]

HOST = "127.0.0.1"
SOCKET_PORT = 5432
"""The number in the socket file's name. The folder is private, so it need not be free anywhere."""

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_ANSWER_WITHIN = 2.0


@dataclasses.dataclass(slots=True)
class Status:
    """What the keeper says of the server, in ``status.json``; true while a keeper holds ``keeper.lock``."""

    state: State = "starting"
    pid: int = 0
    """The postmaster's process id; 0 while there is none."""
    host: str = ""
    """The folder of its Unix socket, or an address."""
    port: int = 0
    failures: int = 0
    """Attempts to start it that failed, one after the other."""
    message: str = ""

    @classmethod
    def read(cls, home: Folder) -> Status:
        """The last status written; `starting` where there is none."""
        said = json.loads(home.read("status.json") or "{}")
        # Another version's keeper may have more to say.
        return cls(**{field.name: said[field.name] for field in dataclasses.fields(cls) if field.name in said})

    def write(self, home: Folder) -> None:
        """Publishes it."""
        home.write("status.json", json.dumps(dataclasses.asdict(self)))

    def answers(self) -> bool:
        """Whether a server answers where the status says, and its process lives."""
        if not is_alive(self.pid):
            return False
        is_socket = self.host.startswith("/")
        with socket.socket(socket.AF_UNIX if is_socket else socket.AF_INET) as client:
            client.settimeout(_ANSWER_WITHIN)
            try:
                client.connect(f"{self.host}/.s.PGSQL.{self.port}" if is_socket else (self.host, self.port))
                # A process that is being killed may still have its socket open. So ask for something, TLS, which each
                # server answers first of all, and ours with a no.
                client.sendall(_SSL_REQUEST)
                return client.recv(1) == b"N"
            except TimeoutError:
                return True  # somebody has it open and is only too busy
            except OSError:
                return False


def is_alive(pid: int) -> bool:
    """Whether a process `pid` runs. One that has ended and waits for its parent does not."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # no /proc here: somebody reaps what is left behind
    return line.rpartition(")")[2].split()[0] not in {"Z", "X"}
