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

The keeper imports, of fastq, only what this module does: it takes 15 MB and loads no engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from fastq.embedded._files import LOG_NAME, Account, Folder, clean_env, open_log, try_lock
from fastq.embedded._status import HOST, SOCKET_PORT, State, Status, is_alive

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
_TRANSIENT_FOR = 30.0
_RETRY_AT_MOST = 5.0


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
        self._is_published = True

    def run(self) -> int:
        """Watches over the server; gives the process's exit status once it has stopped."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            has_failed = self._watch()
        except OSError:
            if self._home.is_in_place():
                raise
            has_failed = False
        if not self._home.is_in_place():
            self._stop(is_fast=False)  # its data were removed under it: there is nothing to write them to
        elif not has_failed:
            self._stop(is_fast=True)
            self._publish("stopped")
        return 0

    def _watch(self) -> bool:
        """Goes on while the server is to run. Whether its end is a failure, which was published."""
        while not self._is_told_to_stop and self._home.is_in_place() and not self._last_user_gone():
            if self._is_down:
                # At each attempt: one that was still starting did not answer yet the time before.
                if time.monotonic() >= self._start_at and not self._adopt():
                    self._launch()
            elif not self._server_lives():
                self._lost()
            elif self._status.state == "starting" and self._is_ready():
                self._was_ready = True
                self._transient_until = 0.0
                self._status.failures = 0
                self._status.message = ""
                self._publish("ready")
            if self._status.state == "failed" and not self._was_ready:
                return True  # a first start has somebody who waits for its error
            if not self._is_published:
                self._publish(self._status.state)
            time.sleep(_TICK if self._status.state == "ready" else _TICK_STARTING)
        return False

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

    def _adopt(self) -> bool:
        """Takes over a server whose keeper was killed, if one answers."""
        lines = self._postmaster_file()
        if len(lines) < 6 or not lines[0].isdigit():
            return False
        found = Status(pid=int(lines[0]), host=lines[4] or lines[5], port=int(lines[3]))
        if not found.answers():
            return False
        self._say(f"took over the running server {found.pid}")
        self._status = found
        self._is_down = False
        self._publish("starting")
        return True

    def _launch(self) -> None:
        try:
            args = self._prepare()
            log = open_log(self._home)
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
        except OSError as error:
            self._failed(str(error))
            return
        self._status.pid = self._child.pid
        self._is_down = False
        self._publish("starting")

    def _prepare(self) -> list[str]:
        """Clears what a killed server left, and says where this one is to listen; gives its command."""
        home = self._home
        with self._data() as data, home.folder("run") as run:
            self._disown_stale_pid(data)
            # A living server is kept apart by its data directory, not by these.
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
        command = [f"{self._settings.bin}/postgres", "-D", f"{home.path}/data"]
        return command + [part for name, value in options.items() for part in ("-c", f"{name}={value}")]

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

    def _lost(self) -> None:
        """The server has ended without being told to."""
        was_ready = self._status.state == "ready"
        # Of one that is not our child nothing is known: it counts as killed too.
        was_killed = self._child is None or (self._child.poll() or 0) < 0
        self._child = None
        self._is_down = True
        self._status.pid = 0
        if was_ready:
            self._say("the server ended unasked; starting it again")
            self._publish("starting")
            return
        message = (self._home.read(LOG_NAME, offset=self._log_offset) or "")[-4000:].strip()
        now = time.monotonic()
        if was_killed or any(text in message for text in _TRANSIENT):
            self._transient_until = self._transient_until or now + _TRANSIENT_FOR
            if now < self._transient_until:
                self._start_at = now + 0.1
                return
        self._failed(message)

    def _failed(self, message: str) -> None:
        """A start has failed. Where it ran before, its users wait for it (a full disk may be cleared): so try again."""
        self._transient_until = 0.0
        self._status.failures += 1
        self._status.message = message
        self._start_at = time.monotonic() + min(0.2 * 2**self._status.failures, _RETRY_AT_MOST)
        self._publish("failed")

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

    def _publish(self, state: State) -> None:
        self._status.state = state
        try:
            self._status.write(self._home)
        except OSError as error:  # the disk is full: no reason to leave the server alone
            if self._is_published:
                self._say(f"status.json can't be written: {error}")
            self._is_published = False
        else:
            self._is_published = True

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC [{os.getpid()}] fastq keeper: {text}\n")
        sys.stderr.flush()


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
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more: it will find no users
        os.write(tell, b"k")
    os.close(tell)
    status = keeper.run()
    os.close(lock)  # before the locks that keep newcomers waiting, which go with the process
    return status
