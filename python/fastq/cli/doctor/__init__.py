"""``fastq doctor``: looks at a database and says what is wrong with it for fastq, and what to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastq import _engine
from fastq._db import Database
from fastq._options import ClientOptions, read_client_options
from fastq.cli._common import database_options, json_option, print_json, read_timeouts, timeout_options
from fastq.cli.doctor._checks import Check
from fastq.cli.doctor._schema import examine_schema
from fastq.cli.doctor._server import examine_server
from fastq.errors import DatabaseError, FastqError
from fastq.settings import resolve_dsn, resolve_schema

_COLOURS: Final = {"ok": "green", "info": "cyan", "warning": "yellow", "problem": "red"}


@click.command()
@json_option
@timeout_options("30")
@database_options
def doctor(
    *,
    as_json: bool,
    dsn: str | None,
    schema: str | None,
    connect_timeout: float | None,
    statement_timeout: float | None,
) -> None:
    """Say what is wrong with a database for fastq, and what to do about it.

    Looks at connection, settings, held snapshots, schema and rights (a worker's, a producer's, a handler's or a viewer's, whichever the
    role has), then at consumers, claims, refused results, failures, leader and leaves. Reads no big table. The exit status is 1 if
    there is a problem; warnings leave it 0.
    """
    checks = []
    console = Console(highlight=False)
    for check in _examine(dsn, schema, read_timeouts(connect_timeout, statement_timeout)):
        checks.append(check)
        if not as_json:
            _print(console, check)
    is_well = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ok": is_well, "fastq": _engine.version, "checks": [asdict(check) for check in checks]})
    if not is_well:
        sys.exit(1)


def _print(console: Console, check: Check) -> None:
    if not console.is_terminal:
        click.echo(f"{check.status:8} {check.name}: {check.message}")
        if check.advice is not None:
            click.echo(f"{'':8} -> {check.advice}")
        return
    text = Text.assemble((check.name, "bold"), f": {check.message}")
    if check.advice is not None:
        text.append(f"\n-> {check.advice}")
    # Two columns, so that what is wrapped stands beside the status, not under it, however narrow the terminal is.
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_column(no_wrap=True, width=8)
    row.add_column(overflow="fold")
    row.add_row(Text(check.status, _COLOURS[check.status]), text)
    console.print(row)


def _examine(dsn: str | None, schema: str | None, options: ClientOptions) -> Iterator[Check]:
    began = time.monotonic()
    try:
        db = Database(resolve_dsn(dsn), resolve_schema(schema), **read_client_options(options))
    except FastqError as error:
        yield Check("connection", "problem", str(error))
        return
    with db:
        try:
            yield from examine_server(db, time.monotonic() - began)
            yield from examine_schema(db)
        except DatabaseError as error:
            yield Check("connection", "problem", str(error))
