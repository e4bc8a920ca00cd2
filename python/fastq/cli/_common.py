"""What the commands share: options, consoles, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


def database_options(command: F) -> F:
    """Add ``--dsn`` and ``--schema``."""
    # Not by click's envvar: the library reads the variables itself, and a help text that shows them must not show values.
    command = click.option(
        "--schema", metavar="NAME", help="The schema that holds fastq's tables.  [FASTQ_SCHEMA, else fastq]"
    )(command)
    return click.option("--dsn", metavar="DSN", help="The database: a URI or key=value pairs.  [FASTQ_DSN]")(command)


def json_option(command: F) -> F:
    """Add ``--json`` as the parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Answer with one JSON object.")(command)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def stderr() -> Console:
    """A console for what is not the command's answer."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


__all__ = ["database_options", "json_option", "print_json", "stderr"]
