"""The keeper: one small process beside a private PostgreSQL, which starts, watches and stops it.

::

    user process ──holds shared──► users.lock ◄──tries exclusive, 5 times a second── keeper ──parent of──► postgres
         │                                                                             ▲
         └── start(): holds state.lock, starts a keeper where none holds keeper.lock ──┘

Invariants:

- Whoever holds ``keeper.lock`` is the only one that starts the server, so two never start at once.
- A user takes its share of ``users.lock`` while it holds ``state.lock``, and the keeper decides to stop while it
  holds both: the last user's leaving and a new one's coming can't cross.
- All three are ``flock`` locks: the kernel drops them with the process, a SIGKILL included.

The file is run by its path (``python -I -S _keeper.py <settings as JSON>``) and imports the standard library alone,
so that the keeper takes 10 MB and not the engine. Its working parts (folders, locks, status) serve the package too.

As root, everything in the home belongs to the plain user that runs the server, who could put links in it. So files
there are opened relative to an open folder, never through a link, and written by rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

HOST = "127.0.0.1"
SOCKET_PORT = 5432
"""The number in the socket file's name. The folder is private, so it need not be free anywhere."""
LOG_NAME = "server.log"

_TICK = 0.2
_TICK_STARTING = 0.02
_FAST_STOP = 60.0
"""Seconds for a fast shutdown with its checkpoint; then an immediate one, which the next start recovers from."""
_IMMEDIATE_STOP = 10.0
_TRANSIENT = (
    "pre-existing shared memory block",  # backends of a killed server that have not noticed yet
    "lock file",  # its predecessor is still on its way out
    "Address already in use",  # another program was faster to take the port
)
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_ANSWER_WITHIN = 2.0
_TRANSIENT_FOR = 30.0
_RETRY_AT_MOST = 5.0
_LOG_AT_MOST = 10_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """The operating system's user that the server runs as."""

    uid: int
    gid: int

    def process_args(self) -> dict[str, Any]:
        """What ``subprocess`` needs to run a child as this user: nothing unless we are root."""
        if os.geteuid() != 0:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def clean_env() -> dict[str, str]:
    """The few variables that programs of ours need: no ``PG*`` that would redirect them, no passwords of the user's."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


class Folder:
    """An open folder of the server's user, mode 0700, in which files are named without following links."""

    def __init__(self, path: Path, fd: int, account: Account) -> None:
        self.path = path
        self.account = account
        self._fd = fd

    @classmethod
    def open(cls, path: Path, account: Account, *, within: Folder | None = None) -> Self:
        """Opens `path` (a name in `within`, where given).

        Raises:
            OSError: it is missing, a link, or no folder.
            PermissionError: it belongs to somebody else, or others may enter.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, dir_fd=None if within is None else within._fd)  # noqa: SLF001
        full = path if within is None else within.path / path
        info = os.fstat(fd)
        if info.st_uid != account.uid or stat.S_IMODE(info.st_mode) & 0o077:
            os.close(fd)
            raise PermissionError(
                errno.EPERM,
                f"must belong to user id {account.uid} and be closed to others (mode 0700); it belongs to "
                f"{info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}",
                str(full),
            )
        return cls(full, fd, account)

    def folder(self, name: str) -> Folder:
        """Opens the folder `name` in this one, after making it where it is missing."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._fd)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                self._own(fd, 0o700)
            finally:
                os.close(fd)
        return Folder.open(Path(name), self.account, within=self)

    def open_file(self, name: str, flags: int = os.O_RDWR) -> int:
        """Opens the file `name`, after making it (mode 0600) where it is missing; gives its descriptor."""
        flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_uid not in {self.account.uid, os.geteuid()}:
            os.close(fd)
            raise PermissionError(errno.EPERM, "not a plain file of our own", str(self.path / name))
        self._own(fd, 0o600)
        return fd

    def write(self, name: str, text: str) -> None:
        """Writes the file `name` (mode 0600) whole or not at all, and durably."""
        made = f"{name}.{secrets.token_hex(4)}"
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                self._own(fd, 0o600)
                os.fsync(fd)
            os.replace(made, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self.remove(made)
            raise

    def read(self, name: str, *, offset: int = 0) -> str | None:
        """The text of the file `name` from byte `offset` on, or None where there is none."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise PermissionError(errno.EPERM, "not a plain file", str(self.path / name))
            file.seek(offset)
            return file.read().decode("utf-8", "replace")

    def rename(self, old: str, new: str) -> None:
        """Renames `old` to `new`, durably."""
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def remove(self, name: str) -> None:
        """Removes the file `name` where it is."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def names(self) -> list[str]:
        """What lies in the folder."""
        return os.listdir(self._fd)  # noqa: PTH208 by descriptor

    def is_in_place(self) -> bool:
        """Whether the folder's path still leads to it (not removed, moved or replaced)."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def close(self) -> None:
        """Closes the folder; twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own(self, fd: int, mode: int) -> None:
        """Gives what we just made to the server's user, with exactly `mode` whatever the umask."""
        info = os.fstat(fd)
        if info.st_uid != self.account.uid:
            os.fchown(fd, self.account.uid, self.account.gid)
        if stat.S_IMODE(info.st_mode) != mode:
            os.fchmod(fd, mode)


def try_lock(fd: int, kind: int) -> bool:
    """Takes the ``flock`` `kind` (``LOCK_SH`` or ``LOCK_EX``) on `fd` if it is free."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclasses.dataclass(slots=True)
class Status:
    """What the keeper says of the server, in ``status.json``; true while a keeper holds ``keeper.lock``."""

    state: Literal["starting", "ready", "failed", "stopped"] = "starting"
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
        text = home.read("status.json")
        return cls() if text is None else cls(**json.loads(text))

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


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a keeper is told on its command line."""

    home: str
    uid: int
    gid: int
    bin: str
    """The folder of the server's programs."""
    use_socket: bool

    @property
    def account(self) -> Account:
        """Whom the server runs as."""
        return Account(self.uid, self.gid)


class Keeper:
    """Runs the server until its last user has gone. Holds ``keeper.lock`` from before it is made."""

    def __init__(self, settings: Settings, home: Folder) -> None:
        self._settings = settings
        self._home = home
        self._state_lock = home.open_file("state.lock")
        self._users_lock = home.open_file("users.lock")
        self._status = Status()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_down = True
        self._was_ready = False
        self._log_offset = 0
        self._start_at = 0.0
        self._transient_until = 0.0
        self._is_told_to_stop = False

    def run(self) -> int:
        """Watches over the server; gives the process's exit status once it has stopped."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._adopt()
        while not self._is_told_to_stop:
            if not self._home.is_in_place():
                self._stop(is_fast=False)  # its data were removed under it: nothing is left to write
                return 1
            if self._last_user_gone():
                break
            if self._is_down:
                if time.monotonic() >= self._start_at:
                    self._launch()
            elif not self._server_lives():
                if not self._lost():
                    return 1
            elif self._status.state == "starting" and self._is_ready():
                self._publish("ready")
                self._was_ready = True
                self._status.failures = 0
            time.sleep(_TICK if self._status.state == "ready" else _TICK_STARTING)
        self._stop(is_fast=True)
        self._publish("stopped")
        return 0

    def _on_signal(self, *_: object) -> None:
        self._is_told_to_stop = True

    def _last_user_gone(self) -> bool:
        """Whether nobody uses the server. If so, holds both locks until the process ends: nobody comes meanwhile."""
        if not try_lock(self._users_lock, fcntl.LOCK_EX):
            return False
        fcntl.flock(self._users_lock, fcntl.LOCK_UN)
        if not try_lock(self._state_lock, fcntl.LOCK_EX):
            return False  # somebody is coming
        if try_lock(self._users_lock, fcntl.LOCK_EX):
            return True
        fcntl.flock(self._state_lock, fcntl.LOCK_UN)
        return False

    def _server_lives(self) -> bool:
        return is_alive(self._status.pid) if self._child is None else self._child.poll() is None

    def _data(self) -> Folder:
        return Folder.open(Path("data"), self._home.account, within=self._home)

    def _postmaster_file(self) -> list[str]:
        """The lines of ``postmaster.pid``: process, folder, start, port, socket folder, address, memory, state."""
        with self._data() as data:
            return (data.read("postmaster.pid") or "").splitlines()

    def _is_ready(self) -> bool:
        lines = self._postmaster_file()
        return len(lines) >= 8 and lines[0] == str(self._status.pid) and lines[7].strip() == "ready"

    def _adopt(self) -> None:
        """Takes over a server whose keeper was killed."""
        lines = self._postmaster_file()
        if len(lines) < 6 or not lines[0].isdigit():
            return
        found = Status(pid=int(lines[0]), host=lines[4] or lines[5], port=int(lines[3]))
        if found.answers():
            self._say(f"took over the running server {found.pid}")
            self._status = found
            self._is_down = False
            self._publish("starting")

    def _launch(self) -> None:
        home = self._home
        with self._data() as data, home.folder("run") as run:
            self._disown_stale_pid(data)
            # Left by a killed server. A living one is kept apart by its data directory, not by these.
            run.remove(f".s.PGSQL.{SOCKET_PORT}")
            run.remove(f".s.PGSQL.{SOCKET_PORT}.lock")
            if self._settings.use_socket:
                self._status.host, self._status.port = str(run.path), SOCKET_PORT
                listen, sockets = "", f'"{run.path}"'
            else:
                self._status.host, self._status.port = HOST, self._free_port()
                listen, sockets = HOST, ""
            options = {
                "config_file": home.path / "postgresql.conf",
                "hba_file": home.path / "pg_hba.conf",
                "ident_file": home.path / "pg_ident.conf",
                "listen_addresses": listen,
                "unix_socket_directories": sockets,
                "unix_socket_permissions": "0700",
                "port": self._status.port,
            }
            args = [f"{self._settings.bin}/postgres", "-D", str(data.path)]
            args += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
            log = open_log(home)
            try:
                self._log_offset = os.fstat(log).st_size
                self._child = subprocess.Popen(  # noqa: S603 our own program with our own arguments
                    args,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=clean_env(),
                    umask=0o077,
                    start_new_session=True,
                    **self._settings.account.process_args(),
                )
            finally:
                os.close(log)
        self._status.pid = self._child.pid
        self._is_down = False
        self._publish("starting")

    def _disown_stale_pid(self, data: Folder) -> None:
        """Keeps a reused process id from keeping a killed server down.

        PostgreSQL won't start while the process named in ``postmaster.pid`` lives, whatever program it is by now.
        Its own parent's id it knows for stale, so that takes the place of the other; the rest of the file stays, with
        the shared memory by which it notices backends that outlived their server.
        """
        lines = (data.read("postmaster.pid") or "").splitlines()
        if not lines or not lines[0].isdigit() or not is_alive(int(lines[0])):
            return
        try:
            program = Path(f"/proc/{lines[0]}/exe").readlink().name
        except OSError:
            return  # can't be told: PostgreSQL decides
        if "postgres" not in program:
            self._say(f"process {lines[0]} of postmaster.pid is a {program} by now")
            data.write("postmaster.pid", "\n".join([str(os.getpid()), *lines[1:], ""]))

    def _free_port(self) -> int:
        """The port used last, so that connection strings given out go on being right; else any that is free."""
        for port in (self._status.port, int(self._home.read("port") or 0), 0):
            with socket.socket(socket.AF_INET) as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, port))
                port_found = int(probe.getsockname()[1])
                self._home.write("port", str(port_found))
                return port_found
        raise OSError(errno.EADDRINUSE, f"no port is free on {HOST}")

    def _lost(self) -> bool:
        """The server has ended without being told to. Says whether the keeper goes on."""
        was_ready = self._status.state == "ready"
        self._child = None
        self._is_down = True
        self._status.pid = 0
        if was_ready:
            self._say("the server ended unasked; starting it again")
            self._publish("starting")
            return True
        message = (self._home.read(LOG_NAME, offset=self._log_offset) or "")[-4000:].strip()
        now = time.monotonic()
        if any(text in message for text in _TRANSIENT):
            self._transient_until = self._transient_until or now + _TRANSIENT_FOR
            if now < self._transient_until:
                self._start_at = now + 0.1
                return True
        self._transient_until = 0.0
        self._status.failures += 1
        self._status.message = message
        self._publish("failed")
        self._start_at = now + min(0.2 * 2**self._status.failures, _RETRY_AT_MOST)
        # Users that were connected wait for it to come back (a full disk may have been cleared). A first start has
        # somebody who waits for its error.
        return self._was_ready

    def _stop(self, *, is_fast: bool) -> None:
        """Stops the server, within 70 seconds whatever it does."""
        if self._is_down or not self._server_lives():
            return
        if is_fast and self._ended_by("fast", signal.SIGINT, _FAST_STOP):
            return
        if not self._ended_by("immediate", signal.SIGQUIT, _IMMEDIATE_STOP) and self._child is not None:
            self._child.kill()

    def _ended_by(self, mode: str, number: signal.Signals, seconds: float) -> bool:
        if self._child is not None:
            self._child.send_signal(number)
            try:
                self._child.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
            return True
        # Of a server that is not our child we know what its user wrote down: so it is stopped with that user's rights.
        program = f"{self._settings.bin}/pg_ctl"
        args = [
            program,
            "stop",
            "-s",
            "-D",
            f"{self._home.path}/data",
            "-m",
            mode,
            "-w",
            "-t",
            str(int(seconds)),
        ]
        done = subprocess.run(  # noqa: S603 our own program with our own arguments
            args,
            check=False,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=clean_env(),
            **self._settings.account.process_args(),
        )
        return done.returncode == 0

    def _publish(self, state: Literal["starting", "ready", "failed", "stopped"]) -> None:
        self._status.state = state
        self._status.write(self._home)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC [{os.getpid()}] fastq keeper: {text}\n")
        sys.stderr.flush()


def open_log(home: Folder) -> int:
    """Opens the server's log to append to; one that has grown over 10 MB is put aside first."""
    log = home.open_file(LOG_NAME, os.O_WRONLY | os.O_APPEND)
    if os.fstat(log).st_size <= _LOG_AT_MOST:
        return log
    os.close(log)
    home.rename(LOG_NAME, f"{LOG_NAME}.old")
    return home.open_file(LOG_NAME, os.O_WRONLY | os.O_APPEND)


def main(argument: str) -> int:
    """Leaves its parent's session and becomes the keeper. The parent's part ends once the keeper holds its lock.

    The process that was started gives way to a child of its own, so that nobody has to wait for the keeper's end.
    """
    settings = Settings(**json.loads(argument))
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        return 0 if os.read(told, 1) else 1
    os.close(told)
    os.setsid()
    os.umask(0o077)
    home = Folder.open(Path(settings.home), settings.account)
    lock = home.open_file("keeper.lock")
    if not try_lock(lock, fcntl.LOCK_EX):
        return 1  # another one is at work
    keeper = Keeper(settings, home)
    Status().write(home)
    log = open_log(home)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.write(tell, b"k")
    os.close(tell)
    status = keeper.run()
    os.close(lock)  # before the locks that keep newcomers waiting, which go with the process
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
