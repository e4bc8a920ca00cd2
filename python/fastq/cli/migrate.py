"""``fastq migrate``: brings a schema to this version, or back."""

from __future__ import annotations

import click

from fastq import migrations
from fastq._options import ClientOptions
from fastq.cli._common import database_options, json_option, print_json, read_timeouts, timeout_options
from fastq.rights import KINDS
from fastq.settings import resolve_schema


@click.command()
@click.option("--target", type=int, metavar="N", help="Apply the steps up to N.  [the newest]")
@click.option("--down", type=int, metavar="N", help="Undo the steps above N (0: all), with what their tables hold.")
@click.option("--yes", is_flag=True, help="With --down: it is meant. Without it, only shows what would be deleted.")
@click.option("--status", is_flag=True, help="Show the steps, and change nothing.")
@click.option(
    "--grants", is_flag=True, help="Print the SQL that grants roles their rights. Runs nothing, needs no database."
)
@click.option("--worker", metavar="ROLE", help="With --grants: a role that may enqueue and work.")
@click.option("--producer", metavar="ROLE", help="With --grants: a role that may only enqueue.")
@click.option(
    "--handler",
    metavar="ROLE",
    help="With --grants: a role that may only complete tasks in its handlers' transactions.",
)
@click.option(
    "--viewer", metavar="ROLE", help="With --grants: a role that may only look.  [all of them, with example names]"
)
@json_option
@timeout_options("none; with --status: 30")
@database_options
def migrate(
    *,
    target: int | None,
    down: int | None,
    yes: bool,
    status: bool,
    grants: bool,
    as_json: bool,
    dsn: str | None,
    schema: str | None,
    connect_timeout: float | None,
    statement_timeout: float | None,
    **roles: str | None,
) -> None:
    """Create fastq's schema, or bring it to this version. Any number of processes may do it at once, while workers run."""
    if sum(given is not None for given in (target, down)) + status + grants > 1:
        raise click.UsageError("--target, --down, --status and --grants exclude each other")
    if yes and down is None:
        raise click.UsageError("--yes belongs to --down")
    if not grants and any(role is not None for role in roles.values()):
        raise click.UsageError(f"{', '.join(f'--{kind}' for kind in KINDS)} belong to --grants")
    options = read_timeouts(connect_timeout, statement_timeout)
    if grants:
        _show_grants(schema, roles, as_json=as_json)
    elif status:
        _show_status(dsn, schema, options, as_json=as_json)
    elif down is None:
        _up(dsn, schema, target, options, as_json=as_json)
    elif yes:
        _down(dsn, schema, down, options, as_json=as_json)
    else:
        _preview(dsn, schema, down, options, as_json=as_json)


def _show_grants(schema: str | None, roles: dict[str, str | None], *, as_json: bool) -> None:
    text = migrations.grants(schema=schema, **roles)
    if as_json:
        print_json({"schema": resolve_schema(schema), "sql": text})
    else:
        click.echo(text, nl=False)


def _up(dsn: str | None, schema: str | None, target: int | None, options: ClientOptions, *, as_json: bool) -> None:
    applied = migrations.migrate(dsn, schema=schema, target=target, **options)
    if as_json:
        print_json({"schema": resolve_schema(schema), "applied": [step.version for step in applied]})
        return
    for step in applied:
        click.echo(f"applied step {step.version}: {step.name}")
    if not applied:
        click.echo(f"schema {resolve_schema(schema)!r}: nothing was missing")


def _down(dsn: str | None, schema: str | None, target: int, options: ClientOptions, *, as_json: bool) -> None:
    undone = migrations.down(dsn, schema=schema, target=target, yes=True, **options)
    if as_json:
        print_json({"schema": resolve_schema(schema), "undone": [step.version for step in undone]})
        return
    for step in undone:
        click.echo(f"undone step {step.version}: {step.name}")
    if not undone:
        click.echo("there was nothing to undo")


def _preview(dsn: str | None, schema: str | None, target: int, options: ClientOptions, *, as_json: bool) -> None:
    loss = migrations.preview_down(dsn, schema=schema, target=target, **options)
    if as_json:
        print_json(
            {
                "schema": resolve_schema(schema),
                "would_undo": [step.version for step in loss.migrations],
                "would_delete": dict(loss.tables),
            }
        )
    elif not loss.migrations:
        click.echo("there is nothing to undo")
        return
    else:
        for step in loss.migrations:
            click.echo(f"would undo step {step.version}: {step.name}")
        for table, rows in loss.tables:
            click.echo(f"would delete table {table}: {rows:,} rows")
    raise click.ClickException("nothing was changed: say --yes if it is meant")


def _show_status(dsn: str | None, schema: str | None, options: ClientOptions, *, as_json: bool) -> None:
    found = migrations.status(dsn, schema=schema, **options)
    if as_json:
        steps = [
            {
                "version": step.version,
                "name": step.name,
                "oldest": step.oldest,
                "applied_at": step.applied_at.isoformat() if step.applied_at is not None else None,
            }
            for step in found.migrations
        ]
        print_json({"schema": found.schema, "version": found.version, "latest": found.latest, "steps": steps})
        return
    click.echo(f"schema {found.schema!r} is at step {found.version}; this fastq knows {found.latest}")
    for step in found.migrations:
        when = f"{step.applied_at:%Y-%m-%d %H:%M:%S} UTC" if step.applied_at is not None else "not applied"
        click.echo(f"  {step.version}  {step.name}  {when}  (works with fastq {step.oldest} and newer)")
