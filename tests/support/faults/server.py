"""A PostgreSQL of a test's own, to be stopped, crashed, filled up and brought back: nobody else's tests use it."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from fastq.embedded import _home, _programs
from fastq.embedded._files import Account, clean_env
from tests.support.faults.network import free_port
from tests.support.waiting import wait_until

ROLE: Final = "fastq"
"""No superuser; owns the database of the same name."""
_SUPERUSER: Final = "postgres"
_STOP: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
Mode = Literal["smart", "fast", "immediate"]

# Durable as PostgreSQL's defaults have it. Addresses and port stand on the command line.
_SETTINGS: Final = """
fsync = on
full_page_writes = on
synchronous_commit = on
max_connections = 100
max_wal_size = 4GB
restart_after_crash = on
log_line_prefix = '%m [%p] '
include_if_exists = 'fastq_test.conf'
"""
_ACCESS: Final = """
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
host replication postgres 127.0.0.1/32 scram-sha-256
"""


@dataclass(frozen=True, slots=True)
class _Programs:
    """A server's programs, the user that it runs as, and a cluster made by it that others are copied from."""

    bin: Path
    account: Account
    password: str
    template: Path

    def popen(
        self, *args: str | Path, prefix: tuple[str, ...] = (), log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a program as that user; a `prefix` starts it, and changes the user itself."""
        output = subprocess.DEVNULL if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            return subprocess.Popen(
                [*prefix, *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=clean_env(),
                # A Ctrl-C in the terminal is the tests' business.
                start_new_session=True,
                **({} if prefix else self.account.process_args()),
            )
        finally:
            if log is not None:
                os.close(output)

    def run(self, *args: str | Path, prefix: tuple[str, ...] = ()) -> None:
        """Runs a program as that user, to its end."""
        process = self.popen(*args, prefix=prefix)
        assert process.wait(120) == 0, f"{args[0]} failed"


def new_folder(account: Account) -> Path:
    """A folder that `account` alone (and root) can enter, where it can reach it."""
    parent = _home.shared_folder(account) if os.geteuid() == 0 else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="fault-", dir=parent)).resolve()
    os.chown(folder, account.uid, account.gid)
    return folder


@functools.cache
def _programs_of(bin_dir: str) -> _Programs:
    """Makes a cluster once: a copy is a tenth of the work."""
    account = _home._plain_user() if os.geteuid() == 0 else Account(os.geteuid(), os.getegid())
    binaries = Path(bin_dir) if bin_dir else _programs.reachable(account)
    folder = new_folder(account)
    weakref.finalize(_programs_of, shutil.rmtree, folder, ignore_errors=True)
    password = secrets.token_hex(16)
    word = folder / "password"
    word.touch(mode=0o600)
    os.chown(word, account.uid, account.gid)
    word.write_text(password)
    made = _Programs(binaries, account, password, folder / "data")
    made.run(
        binaries / "initdb",
        f"--pgdata={made.template}",
        f"--username={_SUPERUSER}",
        f"--pwfile={word}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--no-sync",
    )
    for name, text in (("postgresql.conf", _SETTINGS), ("pg_hba.conf", _ACCESS)):
        with (made.template / name).open("a" if name == "postgresql.conf" else "w") as file:
            file.write(text)
    return made


class PrivateServer:
    """A server with a database `ROLE`, running once it is made. Durable, on loopback TCP with passwords and on a Unix socket.

    The embedded PostgreSQL's programs, or those in the folder that ``FASTQ_TEST_PG_BIN`` names. Port, passwords and data
    stay the same over restarts. Its process is ours alone: `stop` and its kin hit nobody else.

    Args:
        disk: where the data lie; default: an ordinary folder.
        is_log_apart: with a `disk`, its log lies elsewhere and always has room.
        **settings: as for `conf`.
    """

    def __init__(
        self, *, disk: SmallDisk | None = None, is_log_apart: bool = False, **settings: str | float | bool
    ) -> None:
        self._programs = _programs_of(os.environ.get("FASTQ_TEST_PG_BIN", ""))
        self._disk = disk
        account = self._programs.account
        # The socket and the log lie outside of a small disk: both must work when it is full.
        self._folder = new_folder(account)
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._settings: dict[str, str | float | bool] = {}
        self.log_path = self._folder / "server.log"
        if disk is None:
            self.data_dir = self._folder / "data"
            shown = self.data_dir
        else:
            self.data_dir, shown = disk.path / "data", disk.seen_from_here / "data"
        self._data_seen = shown
        self._programs.run("/bin/cp", "-a", self._programs.template, self.data_dir, prefix=self._prefix)
        if is_log_apart:
            move = 'mv "$1/pg_wal" "$2" && ln -s "$2" "$1/pg_wal"'
            self._programs.run("/bin/sh", "-c", move, "sh", self.data_dir, self._folder / "wal", prefix=self._prefix)
        self.port = free_port()
        role_password = secrets.token_hex(16)
        self._write_conf(settings)
        try:
            self.start()
            with psycopg.connect(self._dsn(_SUPERUSER, self._programs.password, "postgres"), autocommit=True) as db:
                db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(ROLE), role_password))
                db.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(ROLE), sql.Identifier(ROLE)))
        except BaseException:
            self.close()
            raise
        self.dsn = self._dsn(ROLE, role_password, ROLE)
        """Over TCP, of the role `ROLE`: no superuser, owner of the database."""
        self.socket_dsn = make_conninfo(self.dsn, host=str(self._folder))
        """The same through the Unix socket."""
        self.superuser_dsn = self._dsn(_SUPERUSER, self._programs.password, ROLE)
        """Over TCP, of a superuser in the same database."""

    # --- running ---------------------------------------------------------------------------------

    def start(self, *, timeout: float = 60.0) -> None:
        """Starts it, and returns once it takes connections (a standby: to read).

        Raises:
            AssertionError: it ended, or was not ready in time; with the end of its log.
        """
        assert not self.is_running, "the server runs already"
        self._process = self._programs.popen(
            self._programs.bin / "postgres",
            "-D",
            self.data_dir,
            *("-c", "listen_addresses=127.0.0.1"),
            *("-c", f"port={self.port}"),
            *("-c", f"unix_socket_directories={self._folder}"),
            *("-c", "logging_collector=off"),
            prefix=self._prefix,
            log=self.log_path,
        )
        try:
            wait_until(self._is_ready_or_ended, timeout=timeout, message="the server's start")
        except AssertionError as error:
            raise AssertionError(f"{error}\nit said:\n{self.log_tail}") from None
        assert self.is_running, f"the server ended at its start; it said:\n{self.log_tail}"

    def stop(self, mode: Mode = "fast", *, timeout: float = 60.0) -> None:
        """Stops it. ``immediate`` is a crash: nothing is written any more, and the next start recovers from the log."""
        process = self._process
        assert process is not None
        assert process.poll() is None, f"the server had ended before; it said:\n{self.log_tail}"
        self._signal(_STOP[mode])
        process.wait(timeout)
        self._process = None

    def kill(self) -> None:
        """SIGKILL to its main process; the others end when they find out."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def restart(self, mode: Mode = "fast") -> None:
        """Stops and starts it."""
        self.stop(mode)
        self.start()

    @property
    def is_running(self) -> bool:
        """Whether its main process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it says of itself that it takes connections."""
        return self.is_running and self._status() in ("ready", "standby")

    def wait_for_end(self, *, timeout: float = 60.0) -> None:
        """Waits until it has ended by itself, as it does where its disk is too full to recover."""
        assert self._process is not None
        self._process.wait(timeout)

    @property
    def log_tail(self) -> str:
        """The end of what it logged."""
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.read_text(errors="replace")[-3000:]
        return "(nothing)"

    # --- faults ----------------------------------------------------------------------------------

    def conf(self, **settings: str | float | bool) -> None:
        """Writes these settings, beside those given before, and reloads them; some wait for a restart, as PostgreSQL's docs say."""
        self._write_conf(settings)
        if self.is_running:
            self._signal(signal.SIGHUP)

    def become_standby(self) -> None:
        """Its next start goes into recovery and stays there, without a primary: every session is read-only until `promote`."""
        assert not self.is_running
        self._programs.run("/bin/sh", "-c", ': >"$1"', "sh", self.data_dir / "standby.signal", prefix=self._prefix)

    def promote(self) -> None:
        """Ends a standby's recovery; returns once it writes."""
        with self.superuser() as db:
            row = db.execute("SELECT pg_promote(true, 30)").fetchone()
        assert row == (True,)

    @contextlib.contextmanager
    def superuser(self) -> Iterator[psycopg.Connection]:
        """A superuser's connection that commits each statement, for the faults that need one."""
        with psycopg.connect(self.superuser_dsn, autocommit=True, connect_timeout=10) as db:
            yield db

    def close(self) -> None:
        """Ends it, and deletes its data."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            # SIGQUIT, so that its children end with it.
            self._process = process
            self._signal(signal.SIGQUIT)
            self._process = None
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _prefix(self) -> tuple[str, ...]:
        return () if self._disk is None else self._disk.enter(self._programs.account)

    def _dsn(self, user: str, password: str, dbname: str) -> str:
        # Said outright: a PGSSLMODE in the environment would ask the embedded build for TLS, which it has none of.
        parts = {"host": "127.0.0.1", "port": str(self.port), "user": user, "password": password, "dbname": dbname}
        return make_conninfo("", **parts, sslmode="disable")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _write_conf(self, settings: dict[str, str | float | bool]) -> None:
        self._settings |= settings
        lines = []
        for name, value in self._settings.items():
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            quoted = text.replace("'", "''")
            lines.append(f"{name} = '{quoted}'\n")
        path = self._data_seen / "fastq_test.conf"
        path.write_text("".join(lines))
        path.chmod(0o644)

    def _status(self) -> str:
        """What the server's own file says of it, as ``pg_ctl`` reads it; empty where there is none."""
        try:
            lines = (self._data_seen / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        # One that was killed leaves its file behind.
        is_ours = self._process is not None and lines[:1] == [str(self._process.pid)]
        return lines[7].strip() if is_ours and len(lines) > 7 else ""

    def _is_ready_or_ended(self) -> bool:
        return not self.is_running or self._status() in ("ready", "standby")


class SmallDisk:
    """A file system of its own size, which only what is started in it sees: a tmpfs in a private mount namespace.

    Args:
        mib: its size.

    Raises:
        OSError: this system lets us make none (a test misses it by that name).
    """

    def __init__(self, mib: int) -> None:
        self._account = _home._plain_user() if os.geteuid() == 0 else Account(os.geteuid(), os.getegid())
        self.path = new_folder(self._account)
        """Where it is, for what was started in it."""
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        unshare = ["unshare", "--mount", "--propagation", "private"]
        if os.geteuid() != 0:
            unshare[1:1] = ["--user", "--map-current-user", "--keep-caps"]
        options = f"size={mib}m,mode=0700,uid={self._account.uid},gid={self._account.gid}"
        program = 'mount -t tmpfs -o "$1" fastq-test "$2" && echo mounted && exec cat'
        try:
            self._keeper = subprocess.Popen(
                [*unshare, "sh", "-c", program, "sh", options, str(self.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as error:
            raise OSError(f"a small disk needs util-linux's unshare: {error}") from error
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "mounted\n":
            _, said = self._keeper.communicate()
            raise OSError(f"no file system can be mounted here: {said.strip()}")
        self.seen_from_here = Path(f"/proc/{self._keeper.pid}/root{self.path}")
        """The same folder, for this process."""
        if not os.access(self.seen_from_here, os.W_OK):
            self.close()
            raise OSError("the private mount can't be reached through /proc")

    def enter(self, account: Account) -> tuple[str, ...]:
        """The words to put before a command that is to see this disk, and run as `account`."""
        words = ("nsenter", "--target", str(self._keeper.pid), "--mount")
        if os.geteuid() != 0:
            return (*words, "--user", "--preserve-credentials")
        user = (f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups")
        return (*words, "setpriv", *user, "--")

    @property
    def free_bytes(self) -> int:
        """What is left."""
        seen = os.statvfs(self.seen_from_here)
        return seen.f_bavail * seen.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Fills it up, to `leave` bytes, with a file of no use."""
        with (self.seen_from_here / "ballast").open("ab") as file:
            while (room := self.free_bytes - leave) > 0:
                try:
                    file.write(b"\0" * min(room, 1 << 20))
                    file.flush()
                except OSError:
                    return

    def relieve(self) -> None:
        """Deletes that file."""
        (self.seen_from_here / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Gives it up, with all that is on it."""
        self._keeper.communicate()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
