"""``fastq bench``: measures fastq on a database."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table

from fastq import bench as benches
from fastq.cli._common import json_option, print_json, stderr

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds between two updates of the progress bar: what it costs is part of what is measured.
_SHOW_EACH = 0.5
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=1)
# What each figure is called, and how it is written.
_ROWS = {
    "tasks": ("tasks", "{:,.0f}"),
    "seconds": ("measured", "{:,.2f} s"),
    "tasks_per_s": ("rate", "{:,.0f} tasks/s"),
    "free_per_s": ("rate before the hold", "{:,.0f} tasks/s"),
    "held_over_free": ("held / free", "{:.3f}"),
    "last_over_first": ("the hold's last / first", "{:.3f}"),
    "window_s": ("  of so long each", "{:,.0f} s"),
    "transactions_held": ("transactions during the hold", "{:,.0f}"),
    "alone_per_s": ("rate without the others", "{:,.0f} tasks/s"),
    "beside_of_alone": ("beside the others / without", "{:.3f}"),
    "least_of_alone": ("the same, the least", "{:.3f}"),
    "bare_per_s": ("bare loop", "{:,.0f} runs/s"),
    "of_bare": ("rate / bare loop", "{:.3f}"),
    "p50_ms": ("p50", "{:.2f} ms"),
    "p90_ms": ("p90", "{:.2f} ms"),
    "p99_ms": ("p99", "{:.2f} ms"),
    "most_ms": ("most", "{:.2f} ms"),
    "enqueue_p50_ms": ("  of it the enqueue, p50", "{:.2f} ms"),
    "enqueue_p99_ms": ("  of it the enqueue, p99", "{:.2f} ms"),
    "idle_statements_per_s": ("idle: statements", "{:.2f} /s"),
    "idle_commits_per_s": ("idle: commits in the database", "{:.2f} /s"),
    "idle_cpu_percent": ("idle: CPU, client", "{:.2f} % of a core"),
    "idle_server_cpu_percent": ("idle: CPU, server (backends)", "{:.2f} % of a core"),
    "client_cpu_us": ("CPU a task, client", "{:.2f} us"),
    "server_cpu_us": ("CPU a task, server (backends)", "{:.2f} us"),
    "peer_cpu_us": ("  asynqpg's shape", "{:.2f} us"),
    "cpu_of_peer": ("  of it", "{:.3f}"),
    "beat_cpu_us": ("  heartbeat and upkeep meanwhile", "{:.2f} us"),
    "server_other_cpu_us": ("CPU a task, server (the rest)", "{:.2f} us"),
    "wal_bytes": ("WAL a task", "{:,.0f} B"),
    "start_p50_ms": ("enqueue to start, p50", "{:.2f} ms"),
    "start_p99_ms": ("  p99", "{:.2f} ms"),
    "start_most_ms": ("  most", "{:.2f} ms"),
    "start_probes": ("  of so many", "{:,.0f}"),
    "start_emptying_p50_ms": ("  while a leaf was emptied, p50", "{:.2f} ms"),
    "start_emptying_p99_ms": ("    p99", "{:.2f} ms"),
    "start_emptying_most_ms": ("    most", "{:.2f} ms"),
    "start_emptying_probes": ("    of so many", "{:,.0f}"),
    "answer_p50_ms": ("enqueue to answer, p50", "{:.2f} ms"),
    "answer_p99_ms": ("  p99", "{:.2f} ms"),
    "answer_most_ms": ("  most", "{:.2f} ms"),
    "answer_emptying_p50_ms": ("  while a leaf was emptied, p50", "{:.2f} ms"),
    "answer_emptying_p99_ms": ("    p99", "{:.2f} ms"),
    "answer_emptying_most_ms": ("    most", "{:.2f} ms"),
    "leaves_emptied": ("leaves emptied", "{:,.0f}"),
    "kept_mb_most": ("tables, most", "{:,.1f} MB"),
    "last_over_middle": ("tables, last third / the one before", "{:.3f}"),
    "payloads_lost": ("payloads lost", "{:,.0f}"),
    "peer_wal_bytes": ("  asynqpg's shape", "{:,.0f} B"),
    "wal_of_peer": ("  of it", "{:.3f}"),
    "counts_p50_ms": ("counts, p50", "{:.1f} ms"),
    "counts_p99_ms": ("counts, p99", "{:.1f} ms"),
    "page_p50_ms": ("a page, the slowest filter's p50", "{:.1f} ms"),
    "page_p99_ms": ("a page, the slowest filter's p99", "{:.1f} ms"),
    "rare_p50_ms": ("a page of what is rare, p50", "{:.1f} ms"),
    "rare_p99_ms": ("a page of what is rare, p99", "{:.1f} ms"),
    "by_time_p50_ms": ("a page in order of created_at", "{:.1f} ms"),
    "tasks_per_claim": ("tasks a claim", "{:,.1f}"),
    "tasks_per_flush": ("tasks a flush", "{:,.1f}"),
    "tasks_per_commit": ("tasks a commit", "{:,.1f}"),
    "backlog_least": ("backlog, least", "{:,.0f}"),
    "backlog_most": ("backlog, most", "{:,.0f}"),
}


class _Bench(Protocol):
    def run(self, dsn: str | None, progress: benches.Progress) -> benches.Result: ...


@click.group()
def bench() -> None:
    """Measure fastq on a database: in a schema of its own, which is dropped at the end.

    Every task is checked in the tables and counted in its handler: if one is missing or ran twice, the exit status is 1 and
    there is no figure.
    """


def _shared(command: F) -> F:
    command = json_option(command)
    return click.option(
        "--dsn",
        metavar="DSN",
        help="The database: a URI or key=value pairs.  [FASTQ_DSN, else a private PostgreSQL that starts by itself]",
    )(command)


_payload_bytes = click.option(
    "--payload-bytes", type=_COUNT, default=70, show_default=True, help="Size of a task's payload as JSON."
)
_handler = click.option("--handler", type=click.Choice(["sync", "async"]), default="sync", show_default=True)
_concurrency = click.option(
    "--concurrency", type=_COUNT, default=32, show_default=True, help="Handlers that run at once."
)
_batch = click.option("--batch", type=_COUNT, default=10_000, show_default=True, help="Tasks a commit.")
_tokens = click.option("--tokens", is_flag=True, help="Give each task an idempotency token of its own.")


def _tasks(default: int | None, shown: str | None = None) -> Callable[[F], F]:
    return click.option("--tasks", type=_COUNT, default=default, show_default=shown or True, help="How many.")


def _seconds(default: float) -> Callable[[F], F]:
    return click.option("--seconds", type=_SECONDS, default=default, show_default=True, help="How long.")


@bench.command()
@_tasks(1_000_000)
@_batch
@_tokens
@_payload_bytes
@_shared
def enqueue(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Write tasks in bulk, each made as it is written."""
    _run(benches.Enqueue(**options), dsn, as_json=as_json)


@bench.command()
@_tasks(None, "1,000,000; with --work-ms as many as take 10 s")
@_handler
@_concurrency
@click.option(
    "--work-ms",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Let each handler sleep; a bare loop of as many threads or coroutines does the same for comparison.",
)
@_payload_bytes
@_shared
def drain(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Run tasks that were loaded before."""
    _run(benches.Drain(**options), dsn, as_json=as_json)


@bench.command()
@_seconds(30)
@_handler
@_concurrency
@_batch
@_payload_bytes
@_shared
def steady(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Enqueue and run beside each other, in one process, after a warm-up of 5 s."""
    _run(benches.Steady(**options), dsn, as_json=as_json)


@bench.command()
@_seconds(120)
@_handler
@_concurrency
@_batch
@_payload_bytes
@_shared
def snapshot(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """As steady, then as long again beside a transaction that holds a snapshot."""
    _run(benches.Snapshot(**options), dsn, as_json=as_json)


@bench.command()
@_tasks(300)
@_handler
@_concurrency
@click.option(
    "--idle-seconds", type=_SECONDS, default=10, show_default=True, help="How long to watch it with nothing to do."
)
@_payload_bytes
@_shared
def latency(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Enqueue one task at a time and see when its handler starts; then watch the consumer idle."""
    _run(benches.Latency(**options), dsn, as_json=as_json)


@bench.command()
@click.option("--rate", type=_COUNT, default=2_000, show_default=True, help="Tasks a second.")
@click.option("--keep", type=_SECONDS, default=120, show_default=True, help="Seconds that completed tasks are kept.")
@_seconds(600)
@click.option("--archive", is_flag=True, help="What is removed goes into the archive first.")
@_concurrency
@_payload_bytes
@_shared
def retention(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Enqueue and run at a steady rate while completed tasks are forgotten, and watch the tables' sizes.

    Beside the load tasks wait and run all the time, whose payloads must be there at the end; and one task at a time is enqueued on its own,
    to see how long that and its start take, above all while a leaf is emptied.
    """
    _run(benches.Retention(**options), dsn, as_json=as_json)


@bench.command()
@_tasks(200_000)
@click.option("--coroutines", type=_COUNT, help="Callers that are coroutines.  [64]")
@click.option("--threads", type=_COUNT, help="Callers that are threads instead.")
@_tokens
@_payload_bytes
@_shared
def single(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Enqueue tasks one a call, from many callers at once."""
    if options["coroutines"] and options["threads"]:
        raise click.UsageError("give --coroutines or --threads, not both")
    _run(benches.Single(**options), dsn, as_json=as_json)


@bench.command()
@click.option("--pending", type=_COUNT, default=1_000_000, show_default=True, help="Tasks that wait.")
@click.option("--completed", type=_COUNT, default=1_000_000, show_default=True, help="Tasks that are completed.")
@click.option("--failed", type=_COUNT, default=10_000, show_default=True, help="Tasks that failed.")
@click.option(
    "--one-by-one", is_flag=True, help="Lay them as if each had been enqueued and completed alone, not in runs of 500."
)
@click.option(
    "--page", type=_COUNT, default=1_000, show_default=True, help="The page that is measured beside the first."
)
@click.option("--calls", type=_COUNT, default=20, show_default=True, help="Calls of each kind.")
@_payload_bytes
@_shared
def lists(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Count tasks and list pages of them."""
    _run(benches.Lists(**options), dsn, as_json=as_json)


@bench.command()
@click.option("--foreign", type=_COUNT, default=500_000, show_default=True, help="Tasks that nobody handles.")
@click.option("--one-by-one", is_flag=True, help="Lay them as if each had been enqueued alone, not in runs of 500.")
@click.option("--same-queue", is_flag=True, help="Have them wait in the queue of the tasks that are drained.")
@_tasks(500_000)
@click.option("--pairs", type=_COUNT, default=3, show_default=True, help="Drains with them, and as many without.")
@_handler
@_concurrency
@_payload_bytes
@_shared
def foreign(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Drain beside tasks that wait and that nobody handles, and without them, in turn."""
    _run(benches.Foreign(**options), dsn, as_json=as_json)


@bench.command()
@_tasks(100)
@click.option("--turns", type=_COUNT, default=5, show_default=True, help="Turns of so many tasks, on each side.")
@click.option(
    "--work-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=110.0,
    show_default=True,
    help="Let each handler sleep.",
)
@_payload_bytes
@_shared
def batch1(*, as_json: bool, dsn: str | None, **options: Any) -> None:
    """Claim and complete tasks one at a time, and do the same in asynqpg's tables, in turn."""
    _run(benches.Batch1(**options), dsn, as_json=as_json)


def _run(which: _Bench, dsn: str | None, *, as_json: bool) -> None:
    console = stderr()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)-7s %(name)s: %(message)s")
    try:
        result = which.run(dsn, _bars(console) if console.is_terminal else benches.no_progress)
    except benches.Stopped as stopped:
        console.print(f"stopped by {stopped}; the benchmark's schema is dropped", markup=False)
        sys.exit(128 + stopped.signal)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: benches.Result) -> None:
    found = result.to_json()
    table = Table(title=f"fastq bench {result.bench}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, (label, form) in _ROWS.items():
        if found.get(name) is not None:
            table.add_row(label, form.format(found[name]))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if found["series"]:
        console.print(_over_time(found["series"]))
    if result.measured:
        calls = Table()
        calls.add_column("what")
        for column in ("calls", "p50", "p99"):
            calls.add_column(column, justify="right")
        for one in result.measured:
            calls.add_row(one.what, str(one.calls), f"{one.p50_ms:.1f} ms", f"{one.p99_ms:.1f} ms")
        console.print(calls)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    embedded = " (embedded)" if result.server.is_embedded else ""
    for line in (_pairs(result.settings), versions + embedded, _pairs(result.server.settings)):
        console.print(line, markup=False)
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, style="yellow")
    if not result.measured:
        console.print("every task done exactly once: checked in the tables, and counted in the process", markup=False)


def _over_time(series: list[dict[str, float]]) -> Table:
    table = Table()
    for name in series[0]:
        table.add_column(name, justify="right")
    for one in series:
        table.add_row(
            *(f"{value:,.1f}" if name.endswith(("_s", "_mb")) else f"{value:,.0f}" for name, value in one.items())
        )
    return table


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _bars(console: Console) -> benches.Progress:
    @contextmanager
    def show(what: str, total: int | None, done: Callable[[], float]) -> Iterator[None]:
        columns = [SpinnerColumn()] if total is None else [BarColumn(), TaskProgressColumn()]
        progress = Progress(
            TextColumn("{task.description}"), *columns, console=console, auto_refresh=False, transient=True
        )
        left = threading.Event()

        def update() -> None:
            bar = progress.add_task(what, total=total)
            while not left.wait(_SHOW_EACH):
                progress.update(bar, completed=done(), refresh=True)

        thread = threading.Thread(target=update, name="fastq-bench-progress", daemon=True)
        with progress:
            thread.start()
            try:
                yield
            finally:
                left.set()
                thread.join()

    return show


__all__ = ["bench"]
