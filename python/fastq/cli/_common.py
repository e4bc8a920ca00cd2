"""What the commands share: options, consoles, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

from fastq._options import ClientOptions

F = TypeVar("F", bound=Callable[..., Any])


def database_options(command: F) -> F:
    """Add ``--dsn`` and ``--schema``."""
    # Not by click's envvar: the library reads the variables itself, and a help text that shows them must not show values.
    command = click.option(
        "--schema", metavar="NAME", help="The schema that holds fastq's tables.  [FASTQ_SCHEMA, else fastq]"
    )(command)
    return click.option("--dsn", metavar="DSN", help="The database: a URI or key=value pairs.  [FASTQ_DSN]")(command)


def timeout_options(statement: str) -> Callable[[F], F]:
    """Add ``--connect-timeout`` and ``--statement-timeout``; `read_timeouts` takes them.

    Args:
        statement: the default of the latter, for its help.
    """

    def add(command: F) -> F:
        command = click.option(
            "--statement-timeout",
            type=float,
            metavar="SECONDS",
            help=f"A statement whose answer takes longer counts as a lost connection.  [{statement}]",
        )(command)
        return click.option(
            "--connect-timeout", type=float, metavar="SECONDS", help="How long a connection may take.  [10]"
        )(command)

    return add


def read_timeouts(connect_timeout: float | None, statement_timeout: float | None) -> ClientOptions:
    """Those that were given, as the library takes them."""
    options: ClientOptions = {}
    if connect_timeout is not None:
        options["connect_timeout"] = connect_timeout
    if statement_timeout is not None:
        options["statement_timeout"] = statement_timeout
    return options


def json_option(command: F) -> F:
    """Add ``--json`` as the parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Answer with one JSON object.")(command)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def stderr() -> Console:
    """A console for what is not the command's answer."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


__all__ = ["database_options", "json_option", "print_json", "read_timeouts", "stderr", "timeout_options"]
