"""A PgBouncer of a test's own, in transaction mode, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import weakref
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fastq.embedded import _home
from fastq.embedded._files import Account, clean_env
from tests.support.faults.network import free_port
from tests.support.faults.server import new_folder
from tests.support.waiting import wait_until

#: Debian puts it where a plain user's PATH does not look.
PROGRAM: Final = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_CONF: Final = """
[databases]
{database} = {target}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = {user}
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
query_wait_timeout = 20
"""


class PgBouncer:
    """Runs once it is made, in front of the database of `dsn`, with whose words it logs in there. `dsn` leads through it.

    Args:
        dsn: of the database.
        pool_size: sessions of the server that all clients share.
    """

    def __init__(self, dsn: str, *, pool_size: int = 3) -> None:
        assert PROGRAM is not None, "there is no pgbouncer here"
        words = {word: str(value) for word, value in conninfo_to_dict(dsn).items()}
        self.pool_size = pool_size
        self._account = _home._plain_user() if os.geteuid() == 0 else Account(os.geteuid(), os.getegid())
        folder = new_folder(self._account)
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._database, self.port = words["dbname"], free_port()
        names = ("host", "port", "user", "password", "dbname")
        target = " ".join(f"{name}={_quote(words[name])}" for name in names if name in words)
        self._conf = folder / "pgbouncer.ini"
        self._conf.touch(mode=0o600)
        os.chown(self._conf, self._account.uid, self._account.gid)
        self._conf.write_text(
            _CONF.format(
                database=self._database, target=target, port=self.port, user=words["user"], pool_size=pool_size
            )
        )
        self.dsn = make_conninfo(
            "",
            host="127.0.0.1",
            port=str(self.port),
            user=words["user"],
            password=words.get("password", ""),
            dbname=self._database,
            sslmode="disable",
        )
        """Through it, of the same role."""
        self._log = folder / "pgbouncer.log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Starts it, and returns once it takes connections."""
        assert PROGRAM is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, str(self._conf)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=clean_env(),
                start_new_session=True,
                **self._account.process_args(),
            )
        try:
            wait_until(self._is_listening, message="PgBouncer's start")
        except AssertionError as error:
            raise AssertionError(f"{error}\nit said:\n{self._log.read_text(errors='replace')[-2000:]}") from None

    def kill(self) -> None:
        """Ends it at once, with all its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def show(self, what: str) -> list[dict[str, object]]:
        """What its console answers to SHOW."""
        with (
            psycopg.connect(
                make_conninfo(self.dsn, dbname="pgbouncer"),
                autocommit=True,
                cursor_factory=psycopg.ClientCursor,
                row_factory=psycopg.rows.dict_row,
            ) as console,
        ):
            return console.execute(f"SHOW {what}".encode()).fetchall()

    def sessions(self, state: str) -> int:
        """How many of the server's sessions are ``active`` (a client's) or ``idle`` (nobody's)."""
        return sum(row["database"] == self._database and row["state"] == state for row in self.show("SERVERS"))

    def close(self) -> None:
        """Ends it."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait(10)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _is_listening(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


def _quote(value: str) -> str:
    """As its configuration has it."""
    escaped = value.replace("'", "''")
    return f"'{escaped}'"


__all__ = ["PROGRAM", "PgBouncer"]
