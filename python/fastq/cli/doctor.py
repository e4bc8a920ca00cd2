"""``fastq doctor``: looks at a database and says what is wrong with it for fastq."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal

import click
from rich.console import Console

from fastq import _engine, migrations
from fastq._db import Database
from fastq.cli._common import database_options, json_option, print_json
from fastq.errors import DatabaseError, FastqError, SchemaError
from fastq.settings import resolve_dsn, resolve_schema

#: Seconds of silence after which no default lets a consumer count as alive.
_ALIVE: Final = 15.0
#: The oldest server that fastq works with.
_OLDEST_SERVER: Final = 140_000
# Those off which a commit that was answered may be gone after a crash.
_DURABILITY: Final = {
    "fsync": "a crash of the machine may destroy the whole database",
    "full_page_writes": "a crash of the machine may destroy pages that were being written",
    "synchronous_commit": "a crash of the server loses the last commits: enqueued tasks, and completions that run again",
}
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    status: Literal["ok", "warning", "problem"]
    message: str


@click.command()
@json_option
@database_options
def doctor(*, as_json: bool, dsn: str | None, schema: str | None) -> None:
    """Check connection, versions, rights, settings that cost durability, and types that wait with no live consumer.

    The exit status is 1 if there is a problem; warnings leave it 0.
    """
    checks = []
    console = Console(highlight=False, soft_wrap=True)
    for check in _examine(dsn, schema):
        checks.append(check)
        if not as_json:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[check.status]
            console.print(f"[{colour}]{check.status:8}[/] {check.name}: ", end="")
            console.print(check.message, markup=False)
    is_well = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ok": is_well, "fastq": _engine.version, "checks": [asdict(check) for check in checks]})
    if not is_well:
        sys.exit(1)


def _examine(dsn: str | None, schema: str | None) -> Iterator[Check]:
    began = time.monotonic()
    try:
        db = Database(resolve_dsn(dsn), resolve_schema(schema))
    except FastqError as error:
        yield Check("connection", "problem", str(error))
        return
    with db:
        try:
            yield from _examine_server(db, time.monotonic() - began)
            yield from _examine_schema(db)
        except DatabaseError as error:
            yield Check("connection", "problem", str(error))


def _examine_server(db: Database, took: float) -> Iterator[Check]:
    [row] = db.query("doctor_server")
    version, version_num, database, role, is_superuser, is_standby, is_read_only, *settings = row
    values = dict(zip(("fsync", "full_page_writes", "synchronous_commit", "autovacuum"), settings, strict=True))
    yield Check("connection", "ok", f"database {database!r} as role {role!r}, connected in {took * 1000:.0f} ms")
    if version_num < _OLDEST_SERVER:
        yield Check("server", "problem", f"PostgreSQL {version}, but fastq needs 14 or newer")
    elif is_standby:
        yield Check("server", "problem", f"PostgreSQL {version}, a standby: nothing can be written; name the primary")
    elif is_read_only:
        yield Check("server", "problem", f"PostgreSQL {version}, and default_transaction_read_only is on for this role")
    else:
        yield Check("server", "ok", f"PostgreSQL {version}")
    if is_superuser:
        yield Check("role", "warning", f"{role!r} is a superuser: fastq needs no such rights")
    for name, danger in _DURABILITY.items():
        status: Literal["ok", "problem"] = "problem" if values[name] == "off" else "ok"
        yield Check(name, status, values[name] if status == "ok" else f"off: {danger}")
    if values["autovacuum"] == "off":
        yield Check(
            "autovacuum", "problem", "off: fastq's tables fill with dead rows, and claims get slower and slower"
        )


def _examine_schema(db: Database) -> Iterator[Check]:
    rights = [f"{privileges} on {name}" for privileges, name in db.query("doctor_rights", db.schema)]
    if rights:
        yield Check("rights", "problem", f"missing: {_some(rights)}")
        if not {f"USAGE on schema {db.schema}", "SELECT on migration"}.isdisjoint(rights):
            # It can't even be looked at.
            return
    try:
        migrations.check(db)
    except SchemaError as error:
        yield Check("schema", "problem", str(error))
        return
    yield Check("schema", "ok", f"{db.schema!r}, fit for fastq {_engine.version}")
    if rights:
        return
    yield Check("rights", "ok", "all that workers and producers need")
    yield from _examine_consumers(db)


def _examine_consumers(db: Database) -> Iterator[Check]:
    consumers = db.query("doctor_consumers", _ALIVE)
    shown = [f"process {pid} on {host} (fastq {version})" for _, pid, host, version, *_ in consumers]
    yield Check("consumers", "ok", f"{len(shown)} alive: {_some(shown)}" if shown else "none alive")
    waiting = [
        f"{type_!r} in queue {queue!r} ({tasks:,} tasks)" for type_, queue, tasks in db.query("doctor_waiting", _ALIVE)
    ]
    if waiting:
        yield Check("waiting", "problem", f"no live consumer takes {_some(waiting)}")
    else:
        yield Check("waiting", "ok", "each type that waits has a live consumer")


def _some(things: list[str]) -> str:
    more = f" and {len(things) - _SHOWN:,} more" if len(things) > _SHOWN else ""
    return "; ".join(things[:_SHOWN]) + more
