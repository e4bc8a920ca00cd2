"""The command line: ``fastq COMMAND``. Each command lives in a module of its own, loaded when it is asked for.

Exit status: 0 all well, 1 it failed or found something wrong, 2 the command was misspelt.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import click

from fastq import _engine
from fastq.errors import FastqError

#: Each command and where it is: ``module:attribute``.
COMMANDS: Final = {
    "worker": "fastq.cli.worker:worker",
    "enqueue": "fastq.cli.enqueue:enqueue",
    "migrate": "fastq.cli.migrate:migrate",
    "doctor": "fastq.cli.doctor:doctor",
    "bench": "fastq.cli.bench:bench",
    "demo": "fastq.cli.demo:demo",
}


class _Commands(click.Group):
    """Loads a command when it is asked for, and shows fastq's errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Their names, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FastqError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_engine.version, prog_name="fastq")
def main() -> None:
    """A task queue for Python on PostgreSQL."""


__all__ = ["COMMANDS", "main"]
