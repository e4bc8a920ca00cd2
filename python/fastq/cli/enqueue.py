"""``fastq enqueue``: one task, or a file of them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastq.app import App
from fastq.cli._common import database_options, json_option, print_json, stderr
from fastq.cli._lines import BadLineError, Line, make_task, read_lines
from fastq.errors import EnqueueError
from fastq.producer import Producer
from fastq.task import OnConflict, Task, TokenScope, TokenUntil

#: Tasks a commit.
_BATCH: Final = 10_000
#: Lines after which the progress bar is told: it costs more than reading one.
_SHOW_EACH: Final = 500
#: Bytes of lines that a batch holds at most.
_BATCH_BYTES: Final = 32 * 1024 * 1024


@click.command()
@click.argument("type", required=False, metavar="[TYPE")
@click.argument("payload", required=False, metavar="[PAYLOAD]]")
@click.option("--file", "path", metavar="FILE", help="Enqueue the tasks of a JSON Lines file; - is standard input.")
@click.option("--strict", is_flag=True, help="With --file: one bad line, and nothing is written.")
@click.option("--queue", metavar="NAME", help="[default]")
@click.option("--priority", type=int, metavar="N", help="0 to 9: within its queue the higher starts first.  [0]")
@click.option("--delay", type=float, metavar="SECONDS", help="Let it wait before it may start.")
@click.option("--run-at", metavar="TIME", help="Not before this time: ISO 8601 with its offset from UTC.")
@click.option("--max-attempts", type=int, metavar="N", help="Runs in all before it fails for good.  [3]")
@click.option("--timeout", type=float, metavar="SECONDS", help="End an attempt of it after this time.  [its type's]")
@click.option(
    "--retry",
    metavar="JSON",
    help='Wait so between attempts: {"constant": 5}, or {"exponential": {"exponent": 2}} (jitter, maximum).  [its type\'s]',
)
@click.option("--expires-at", metavar="TIME", help="Not started by this time (ISO 8601 with its offset), it expires.")
@click.option("--token", metavar="TOKEN", help="Idempotency token: a second task with it is not enqueued.")
@click.option("--token-scope", type=click.Choice(get_args(TokenScope)), help="Among which tasks it is unique.  [type]")
@click.option("--token-until", type=click.Choice(get_args(TokenUntil)), help="What frees it.  [removed]")
@click.option("--token-ttl", type=float, metavar="SECONDS", help="Hold it no longer.")
@click.option("--on-conflict", type=click.Choice(get_args(OnConflict)), help="What to do where it is held.  [existing]")
@json_option
@database_options
def enqueue(
    *,
    type: str | None,  # noqa: A002 - the argument's name
    payload: str | None,
    path: str | None,
    strict: bool,
    queue: str | None,
    priority: int | None,
    delay: float | None,
    run_at: str | None,
    max_attempts: int | None,
    timeout: float | None,
    retry: str | None,
    expires_at: str | None,
    token: str | None,
    token_scope: str | None,
    token_until: str | None,
    token_ttl: float | None,
    on_conflict: str | None,
    as_json: bool,
    dsn: str | None,
    schema: str | None,
) -> None:
    """Enqueue one task of TYPE with PAYLOAD (JSON), or many from a file.

    In a file each line is a JSON object with the keys type, payload, queue, priority, delay, run_at, max_attempts, timeout, retry,
    expires_at, idempotency_token, token_scope, token_until, token_ttl and on_conflict; only type is needed. Tasks are committed every
    10,000. A bad line is reported and left out, and the exit status is 1 at the end; so is one whose token is held and whose
    on_conflict is "raise".
    """
    options = {
        "queue": queue,
        "priority": priority,
        "delay": delay,
        "run_at": run_at,
        "max_attempts": max_attempts,
        "timeout": timeout,
        "retry": None if retry is None else _read_json("--retry", retry),
        "expires_at": expires_at,
        "idempotency_token": token,
        "token_scope": token_scope,
        "token_until": token_until,
        "token_ttl": token_ttl,
        "on_conflict": on_conflict,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if path is None:
        if type is None:
            raise click.UsageError("give a TYPE, or a --file")
        if strict:
            raise click.UsageError("--strict belongs to --file")
        task = _read_task(type, payload, given)
        with App(dsn, schema=schema).producer as producer:
            id, is_new = producer.enqueue(task)  # noqa: A001
        if as_json:
            print_json({"id": id, "is_new": is_new})
        else:
            click.echo(str(id))
            if not is_new:
                click.echo(f"a task with token {token!r} was there before", err=True)
        return
    if type is not None or given:
        raise click.UsageError("a --file names each task's type and options itself")
    with _open(path) as file, App(dsn, schema=schema).producer as producer:
        _enqueue_file(producer, file, path, strict=strict, as_json=as_json)


def _read_task(type_: str, payload: str | None, given: dict[str, Any]) -> Task:
    value = None if payload is None else _read_json("PAYLOAD", payload)
    try:
        return make_task({"type": type_, "payload": value, **given})
    except BadLineError as error:
        raise click.UsageError(str(error)) from error


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{name} is not JSON: {error}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(path).open("rb") as file:
            yield file
    except IsADirectoryError as error:
        raise click.ClickException(f"{path} is a folder") from error
    except FileNotFoundError as error:
        raise click.ClickException(f"there is no file {path}") from error
    except PermissionError as error:
        raise click.ClickException(f"{path} can't be read: {error.strerror}") from error


@dataclass(slots=True)
class _Tally:
    """What became of the lines."""

    console: Console
    enqueued: int = 0
    duplicates: int = 0
    last_line: int = 0
    """Lines up to this one are in, or reported."""
    bad: list[dict[str, Any]] = field(default_factory=list)

    def report(self, number: int, error: str, *, left_out: bool = True) -> None:
        self.bad.append({"line": number, "error": error})
        self.console.print(f"line {number}{' left out' if left_out else ''}: {error}", markup=False)


def _enqueue_file(producer: Producer, file: BinaryIO, path: str, *, strict: bool, as_json: bool) -> None:
    console = stderr()
    total = Path(path).stat().st_size if path != "-" and Path(path).is_file() else None
    progress = Progress(
        *([BarColumn(), TaskProgressColumn(), TimeRemainingColumn()] if total else [SpinnerColumn()]),
        TextColumn("{task.fields[read]:,} tasks read"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tally = _Tally(console)
    with progress:
        bar = progress.add_task("", total=total, read=0)

        def read() -> Iterator[Line]:
            size = 0
            for count, line in enumerate(read_lines(file), 1):
                size += line.size
                if count % _SHOW_EACH == 0:
                    progress.update(bar, completed=size, read=count)
                yield line

        if strict:
            _enqueue_all_or_none(producer, read(), tally)
        else:
            _enqueue_in_batches(producer, read(), tally)
    if as_json:
        print_json({"enqueued": tally.enqueued, "duplicates": tally.duplicates, "bad_lines": tally.bad})
    else:
        were_there = f"; {tally.duplicates:,} were there before" if tally.duplicates else ""
        left_out = f"; {len(tally.bad):,} bad lines" if tally.bad else ""
        click.echo(f"enqueued {tally.enqueued:,} tasks{were_there}{left_out}")
    if tally.bad:
        sys.exit(1)


def _enqueue_all_or_none(producer: Producer, lines: Iterator[Line], tally: _Tally) -> None:
    numbers: list[int] = []
    has_tokens = False

    def tasks() -> Iterator[Task]:
        nonlocal has_tokens
        for line in lines:
            if line.task is None:
                tally.report(line.number, line.error or "", left_out=False)
                raise BadLineError
            has_tokens = has_tokens or line.task.idempotency_token is not None
            numbers.append(line.number)
            yield line.task

    try:
        results = producer.enqueue_many(tasks())
    except EnqueueError as error:
        if error.index is not None and not tally.bad:
            tally.report(numbers[error.index], str(error), left_out=False)
        if not tally.bad:
            raise
        return
    tally.duplicates = sum(not result.is_new for result in results) if has_tokens else 0
    tally.enqueued = len(results) - tally.duplicates


def _enqueue_in_batches(producer: Producer, lines: Iterator[Line], tally: _Tally) -> None:
    for batch in _batches(lines, tally):
        last_line = batch[-1][0]
        try:
            _enqueue_batch(producer, batch, tally)
        except Exception:
            tally.console.print(
                f"stopped: {tally.enqueued:,} tasks are in, from the lines up to {tally.last_line}", markup=False
            )
            raise
        tally.last_line = last_line


def _enqueue_batch(producer: Producer, batch: list[tuple[int, Task]], tally: _Tally) -> None:
    while batch:
        try:
            results = producer.enqueue_many([task for _, task in batch])
        except EnqueueError as error:
            # What only the engine finds is a bad line as well.
            if error.index is None:
                raise
            number, _ = batch.pop(error.index)
            tally.report(number, str(error))
            continue
        duplicates = 0
        if any(task.idempotency_token is not None for _, task in batch):
            duplicates = sum(not result.is_new for result in results)
        tally.duplicates += duplicates
        tally.enqueued += len(results) - duplicates
        return


def _batches(lines: Iterator[Line], tally: _Tally) -> Iterator[list[tuple[int, Task]]]:
    # Lists, not one stream with commit_every: a slow input would hold a transaction open, and the server's clean-up with it.
    batch: list[tuple[int, Task]] = []
    size = 0
    for line in lines:
        if line.task is None:
            tally.report(line.number, line.error or "")
            continue
        batch.append((line.number, line.task))
        size += line.size
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
