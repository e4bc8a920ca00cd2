"""Processes that use an embedded PostgreSQL, to be ended in every way there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

_PROGRAM = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[2])
from fastq import embedded
try:
    server = embedded.start(sys.argv[1] or None, timeout=60)
except embedded.EmbeddedError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(1)
print(json.dumps({"dsn": server.dsn, "admin_dsn": server.admin_dsn, "data_dir": str(server.data_dir)}), flush=True)
for line in sys.stdin:
    exec(json.loads(line))
    print("{}", flush=True)
"""


class User:
    """A process that has called `embedded.start`, in a session of its own. Leaving the block ends its input: a clean end."""

    def __init__(
        self,
        data_dir: Path | None,
        *,
        import_first: tuple[Path, ...] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        paths = [*map(str, import_first), *(path for path in sys.path if path)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(data_dir or ""), json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        self._said: dict[str, str] | None = None

    def said(self) -> dict[str, str]:
        """What it said of its start: a `dsn`, or an `error`."""
        if self._said is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, f"the user ended with status {self.process.wait()} and said nothing"
            self._said = json.loads(line)
        return self._said

    @property
    def dsn(self) -> str:
        said = self.said()
        assert "dsn" in said, said
        return said["dsn"]

    @property
    def admin_dsn(self) -> str:
        assert self.dsn
        return self.said()["admin_dsn"]

    def run(self, code: str) -> None:
        """Runs `code` in it, where `server` is its server, and returns when that is done."""
        self.said()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "{}\n", f"the user failed at: {code}"

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self._wait()

    def end(self) -> None:
        """Lets it come to its end, without a call of `close`."""
        self._wait()

    def _wait(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        self._wait()


def postmaster_pid(admin_dsn: str) -> int:
    """The process id of the server that answers there."""
    with psycopg.connect(admin_dsn, connect_timeout=5) as connection:
        row = connection.execute("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int").fetchone()
    assert row is not None
    return int(row[0])


def keeper_pid(home: Path) -> int:
    """The process id of the keeper of `home`, which names it in its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if len(words) > 6 and b"fastq.embedded._keeper" in words[4] and json.loads(words[6])["home"] == str(home):
                return int(entry.name)
    raise AssertionError(f"no keeper of {home} runs")
