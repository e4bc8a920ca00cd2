"""The PostgreSQL that the tests run on: a given one, one in a container, or the embedded one."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.waiting import wait_until

_IMAGE = "postgres:18"


@dataclass(frozen=True, slots=True)
class Database:
    """A database for tests."""

    dsn: str
    """Of a role that is no superuser and may create schemas."""
    admin_dsn: str | None
    """Of a superuser in the same database; None where the database was given."""


@contextlib.contextmanager
def any_database() -> Iterator[Database]:
    """The database of ``FASTQ_TEST_DSN`` (see above); else one in a container, where a Docker engine runs; else an embedded one."""
    with contextlib.ExitStack() as stack:
        if dsn := os.environ.get("FASTQ_TEST_DSN"):
            database = Database(_of_this_process(dsn), None)
        elif importlib.util.find_spec("testcontainers") is not None and _docker_answers():
            database = stack.enter_context(_in_container())
        else:
            database = stack.enter_context(_embedded())
        _check(database.dsn)
        yield database


def _of_this_process(dsn: str) -> str:
    """Tests look at all that goes on in their database: of several processes that run them, the second has ``NAME_2``, and so on."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) + 1
    if number == 1:
        return dsn
    with psycopg.connect(dsn, connect_timeout=10) as connection:
        name = connection.info.dbname
    return make_conninfo(dsn, dbname=f"{name}_{number}")


def new_data_dir() -> Path:
    """A path for an embedded database's data, not yet there: `start` makes it, with the rights that it needs."""
    return Path(tempfile.gettempdir()).resolve() / f"fastq-test-{secrets.token_hex(6)}"


def home_of(data_dir: Path) -> Path:
    """The folder in which the cluster, the locks and the log of `data_dir` lie (``_home.py``)."""
    return (data_dir / "pg").resolve()


def is_stopped(data_dir: Path) -> bool:
    """Whether neither the server of `data_dir` nor its keeper runs."""
    home = home_of(data_dir)
    if not (home / "keeper.lock").exists():
        return True
    if (home / "data" / "postmaster.pid").exists():
        return False
    with (home / "keeper.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def remove_data_dir(data_dir: Path) -> None:
    """Waits until the server of `data_dir` has stopped, and deletes its data, wherever they lie."""
    wait_until(lambda: is_stopped(data_dir), timeout=90, message=f"the stop of the server in {data_dir}")
    shutil.rmtree(home_of(data_dir), ignore_errors=True)
    shutil.rmtree(data_dir, ignore_errors=True)


def _check(dsn: str) -> None:
    """What passes for a superuser proves nothing about rights: refuse to test as one."""
    with psycopg.connect(dsn, connect_timeout=10) as connection:
        row = connection.execute(
            "SELECT rolsuper, has_database_privilege(current_database(), 'CREATE') "
            "FROM pg_catalog.pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert row is not None
    assert not row[0], "the tests' role must be no superuser"
    assert row[1], "the tests' role must have the right to create schemas (CREATE on the database)"


@contextlib.contextmanager
def _embedded() -> Iterator[Database]:
    from fastq import embedded  # noqa: PLC0415 not for those who give a database

    data_dir = new_data_dir()
    with embedded.start(data_dir) as server:
        yield Database(server.dsn, server.admin_dsn)
    remove_data_dir(data_dir)


def _docker_answers() -> bool:
    """Whether there is an engine: the command line alone is no sign of one."""
    try:
        done = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@contextlib.contextmanager
def _in_container() -> Iterator[Database]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not our tests'
        module: Any = importlib.import_module("testcontainers.postgres")
        container = module.PostgresContainer(_IMAGE, username="postgres", dbname="postgres", driver=None)
        container.start()
    try:
        admin_dsn = container.get_connection_url()
        password = secrets.token_hex(16)
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE ROLE fastq LOGIN PASSWORD {}").format(password))
            admin.execute("CREATE DATABASE fastq OWNER fastq")
        yield Database(
            make_conninfo(admin_dsn, user="fastq", password=password, dbname="fastq"),
            make_conninfo(admin_dsn, dbname="fastq"),
        )
    finally:
        container.stop()
