"""``fastq worker``: runs an app's tasks until it is told to stop."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
from typing import NoReturn

import click

from fastq.app import App, ConsumerArguments
from fastq.cli._common import database_options
from fastq.errors import ConsumerError

_LEVELS = ("debug", "info", "warning", "error")

_log = logging.getLogger("fastq.worker")


@click.command()
@click.argument("target", metavar="MODULE:APP")
@click.option("--queues", metavar="A,B", help="The queues to take tasks from.  [all]")
@click.option("--concurrency", type=int, metavar="N", help="Handlers that run at once.  [32]")
@click.option("--stop-timeout", type=float, metavar="SECONDS", help="How long a stop waits for running handlers.  [30]")
@click.option(
    "--stuck-limit",
    type=int,
    metavar="N",
    help="Sync handlers whose time is up and that go on; with more, it ends itself.  [32]",
)
@click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True)
@database_options
def worker(
    *,
    target: str,
    queues: str | None,
    concurrency: int | None,
    stop_timeout: float | None,
    stuck_limit: int | None,
    log_level: str,
    dsn: str | None,
    schema: str | None,
) -> None:
    """Run the tasks of APP in MODULE, which is looked for in the current folder first.

    SIGTERM or Ctrl-C stops it in order: it claims no more and waits for running handlers. A second one ends it at once.

    It ends by itself, with status 1, when more than --stuck-limit sync handlers go on although their timeout is over.
    """
    # Before the module is imported, so that it may set up logging its own way.
    logging.basicConfig(
        stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    app = load_app(target)
    if dsn is not None or schema is not None:
        app.use(dsn=dsn, schema=schema)
    settings: ConsumerArguments = {}
    if queues is not None:
        settings["queues"] = [name.strip() for name in queues.split(",")]
    if concurrency is not None:
        settings["concurrency"] = concurrency
    if stop_timeout is not None:
        settings["stop_timeout"] = stop_timeout
    if stuck_limit is not None:
        settings["stuck_limit"] = stuck_limit
    consumer = app.consumer(**settings)
    _log.info(
        "process %d runs %s of %s in schema %s",
        os.getpid(),
        ", ".join(sorted(app.types)) or "nothing",
        f"queues {queues}" if queues is not None else "all queues",
        app.schema,
    )
    try:
        consumer.run()
    except ConsumerError as error:
        if not _has_handlers():
            raise
        click.echo(f"Error: {error}", err=True)
        _leave(1)
    _log.info("process %d has stopped", os.getpid())
    if _has_handlers():
        _leave(0)


def _has_handlers() -> bool:
    """Whether handlers that were given up go on."""
    return any(thread.name.startswith("fastq-handler-") for thread in threading.enumerate())


def _leave(status: int) -> NoReturn:
    """End the process beside handlers that were given up: where the interpreter ends their threads, under a native call, it is aborted."""
    atexit._run_exitfuncs()  # noqa: SLF001 - what was registered runs as at any end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def load_app(target: str) -> App:
    """The app that ``module:attribute`` names; without an attribute, ``app``."""
    module_name, _, attribute = target.partition(":")
    here = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only if it is this one that is missing: what the module itself fails to import is its own story, with a traceback.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise click.ClickException(f"there is no module {module_name!r} in {here}, nor is it installed") from error
    except (TypeError, ValueError) as error:
        if module_name and not module_name.startswith("."):
            raise
        raise click.UsageError(f"{target!r} names no module: write it like tasks:app") from error
    found: object = module
    for name in (attribute or "app").split("."):
        found = getattr(found, name, None)
    if not isinstance(found, App):
        what = "is not there" if found is None else f"is {type(found).__name__}"
        raise click.ClickException(f"{attribute or 'app'} in module {module_name!r} {what}, but must be a fastq.App")
    return found
