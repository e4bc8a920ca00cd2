"""Files and locks in folders that belong to the server's user.

As root, everything in the home belongs to the plain user that runs the server, who could put links in it. So files
there are opened relative to an open folder, never through a link, and written by rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Self

LOG_NAME = "server.log"
_LOG_AT_MOST = 10_000_000
"""Bytes of the log before it is put aside, at a start."""


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


def open_log(home: Folder) -> int:
    """Opens the server's log to append to; one that has grown over 10 MB is put aside first."""
    log = home.open_file(LOG_NAME, os.O_WRONLY | os.O_APPEND)
    if os.fstat(log).st_size <= _LOG_AT_MOST:
        return log
    os.close(log)
    home.rename(LOG_NAME, f"{LOG_NAME}.old")
    return home.open_file(LOG_NAME, os.O_WRONLY | os.O_APPEND)
