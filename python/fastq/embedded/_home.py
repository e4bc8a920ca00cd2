"""Where a private PostgreSQL lives, and whom it runs as.

::

    data_dir/            0700 if we make it
      fastq.lock         held while the home is made
      pg/                the home: 0700, of the server's user. Or a link to it, see below
        data/            the cluster (initdb's 0700)
        run/             the Unix socket (0700)
        passwords.json   0600; used only where there is no Unix socket
        server.log       the server's and the keeper's
        *.conf, *.lock, status.json

PostgreSQL refuses to run as root. Root's server runs as an existing plain user, ``postgres`` or else ``nobody``, and
the home is that user's. Where that user can't reach it (below root's own home directory), no folder's permissions are
touched: the home is made in a folder of root's, ``/var/lib/fastq-embedded`` or else under ``/var/tmp`` or the system's
temporary folder, and ``pg`` is a link that remembers it. Such a home has to be deleted apart from `data_dir`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fastq.embedded._errors import EmbeddedError
from fastq.embedded._files import Account, Folder, clean_env, try_lock

_LOCK_NAME = "fastq.lock"
_SHARED_NAME = "fastq-embedded"
_PLAIN_USERS = ("postgres", "nobody")


def open_home(data_dir: Path, deadline: float) -> Folder:
    """Opens the home of `data_dir`, after making both where they are missing.

    Args:
        data_dir: an absolute path without links.
        deadline: when to give up waiting for another process that makes it (of ``time.monotonic``).

    Raises:
        EmbeddedError: it can't be made, or belongs to somebody else.
    """
    try:
        account = Account(os.geteuid(), os.getegid()) if os.geteuid() else _plain_user()
        if not os.path.lexists(data_dir):
            _make_data_dir(data_dir, account)
        _check_data_dir(data_dir)
        home = _find(data_dir / "pg")
        if home is None:
            with _lock_of(data_dir, account, deadline):
                home = _find(data_dir / "pg") or _make(data_dir / "pg", account)
    except OSError as error:
        raise EmbeddedError(f"the data directory {data_dir} can't be used: {error}") from error
    return home


def lock_by(deadline: float, fd: int, kind: int, waits_for: str) -> None:
    """Takes the ``flock`` `kind` on `fd`.

    Raises:
        EmbeddedError: others still had it at `deadline` (of ``time.monotonic``).
    """
    while not try_lock(fd, kind):
        if time.monotonic() >= deadline:
            raise EmbeddedError(f"gave up waiting for {waits_for}")
        time.sleep(0.02)


def can_run(account: Account, *args: str) -> bool:
    """Whether the program `args` runs, as `account`, and says that all is well."""
    try:
        done = subprocess.run(  # noqa: S603 our own arguments
            args,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=clean_env(),
            timeout=30,
            **account.process_args(),
        )
    except OSError as error:
        if error.filename != args[0]:  # not the program was refused, but the change of user before it
            raise EmbeddedError(f"root may not run programs as user id {account.uid} here: {error.strerror}") from error
        return False
    return done.returncode == 0


def shared_folder(account: Account) -> Path:
    """A folder of root's (mode 0711) that `account` can reach, for what it can't be given in place.

    Raises:
        EmbeddedError: there is none.
    """
    tried = []
    for parent in dict.fromkeys(("/var/lib", "/var/tmp", tempfile.gettempdir())):  # noqa: S108 checked below
        path = Path(parent, _SHARED_NAME)
        tried.append(str(path))
        with contextlib.suppress(OSError):
            above = Path(parent).stat()
            if above.st_uid != 0 or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
                continue  # somebody else could put another folder in its place
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                path.chmod(0o711)
            info = path.lstat()
            if stat.S_ISDIR(info.st_mode) and info.st_uid == 0 and not info.st_mode & 0o022 and _reaches(account, path):
                return path
    raise EmbeddedError(
        f"user id {account.uid}, which PostgreSQL is to run as, can reach none of {', '.join(tried)}; "
        "choose a data directory that it can reach (argument data_dir, or FASTQ_DATA_DIR)"
    )


def user_name(uid: int) -> str:
    """The name of the user `uid`.

    Raises:
        EmbeddedError: it has none.
    """
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise EmbeddedError(
            f"user id {uid} has no name on this system (no entry in /etc/passwd), and PostgreSQL's initdb asks for one: "
            "give it an entry, or run as another user"
        ) from None


def _plain_user() -> Account:
    """Whom root's new server runs as."""
    for name in _PLAIN_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL does not run as root, and this system has no user postgres or nobody to run it as: "
        "start it as a plain user"
    )


def _reaches(account: Account, path: Path) -> bool:
    return can_run(account, "/bin/sh", "-c", 'cd -- "$1"', "sh", str(path))


def _give(path: Path, account: Account) -> None:
    """Gives the file or folder `path`, which is ours, to `account`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or (stat.S_ISREG(info.st_mode) and info.st_nlink != 1):
            raise PermissionError(errno.EPERM, "was exchanged for another", str(path))
        os.fchown(fd, account.uid, account.gid)
    finally:
        os.close(fd)


def _make_data_dir(path: Path, account: Account) -> None:
    """Makes `path`, whole or not at all: others that race for it never see it without its lock and its owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_given = os.geteuid() == 0 and _reaches(account, path.parent)
    made = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))  # mode 0700
    try:
        lock = made / _LOCK_NAME
        lock.touch(mode=0o600)
        if is_given:
            _give(lock, account)
            _give(made, account)
        made.rename(path)  # never over a folder with a file in it
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not path.is_dir():  # else another process was faster
            raise


def _check_data_dir(path: Path) -> None:
    """Refuses a folder in which somebody else could put another server in ours' place."""
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise EmbeddedError(f"the data directory {path} is no folder")
    me = os.geteuid()
    if me not in {0, info.st_uid} and info.st_uid != 0:
        raise EmbeddedError(f"the data directory {path} belongs to user id {info.st_uid}, not to you ({me})")
    if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        raise EmbeddedError(
            f"everybody may write to the data directory {path} (mode {stat.S_IMODE(info.st_mode):04o}), so anybody "
            "could replace the database in it: take that right away (chmod o-w), or choose another folder"
        )


@contextlib.contextmanager
def _lock_of(data_dir: Path, account: Account, deadline: float) -> Iterator[None]:
    lock = data_dir / _LOCK_NAME
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in {os.geteuid(), account.uid}:
            raise EmbeddedError(f"{lock} is no plain file of our own")
        lock_by(deadline, fd, fcntl.LOCK_EX, f"another process that prepares {data_dir}")
        yield
    finally:
        os.close(fd)


def _find(path: Path) -> Folder | None:
    """Opens the home at `path`, or that it is a link to; None where there is none yet, or one half made."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(info.st_mode):
        # Only root makes such a link, and only into a folder that nobody else can write to.
        home = path.readlink()
        if info.st_uid != 0 or home.parent.name != _SHARED_NAME or home.parent.lstat().st_uid != 0:
            raise EmbeddedError(f"{path} is a link to {home} that fastq did not make")
        path, info = home, home.lstat()
    if os.geteuid():
        return Folder.open(path, Account(os.geteuid(), os.getegid()))
    if info.st_uid == 0:
        return None
    # The server goes on running as the home's owner, whoever starts it.
    try:
        group = pwd.getpwuid(info.st_uid).pw_gid
    except KeyError:
        group = info.st_gid
    return Folder.open(path, Account(info.st_uid, group))


def _make(path: Path, account: Account) -> Folder:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()  # one that a killed process had made and not yet given away: empty
    home = path
    if os.geteuid() == 0 and not _reaches(account, path.parent):
        home = shared_folder(account) / secrets.token_hex(8)
    home.mkdir(mode=0o700)
    if os.geteuid() == 0:
        _give(home, account)
    if home != path:
        path.symlink_to(home)
    return Folder.open(home, account)
