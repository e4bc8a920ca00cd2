"""``fastq demo``: 200,000 tasks through two workers, one of which is killed, and what became of each."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Task as Bar
from rich.table import Table
from rich.text import Text

from fastq import _engine
from fastq.cli._common import print_json
from fastq.demo.audit import KillReport, TypeReport
from fastq.demo.run import Report, run

#: Width of the column that says what a line is about.
_MARGIN: Final = 12
_STYLES: Final = {"completed": "green", "runs": "cyan"}
#: Of the lines with a problem so many are named.
_NAMED: Final = 5


@click.command()
@click.option(
    "--tasks", type=click.IntRange(1_000, 1_000_000), default=200_000, show_default=True, metavar="N", help="How many."
)
@click.option("--json", "as_json", is_flag=True, help="Answer with one JSON object on standard output.")
@click.option("--dsn", metavar="DSN", help="Use this database.  [a private PostgreSQL, in FASTQ_DATA_DIR, else .fastq]")
def demo(*, tasks: int, as_json: bool, dsn: str | None) -> None:
    """Run N real tasks of three types from a file through two workers, and kill one of them half-way.

    It ends with a table of what became of each line of the file, by the tables and by what the handlers wrote down. The exit
    status is 1 if any was lost, or did not become what it should. Everything happens in a schema of its own, which is
    dropped at the end.
    """
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    console.print(
        f"\n[bold]fastq demo[/]{'':{_MARGIN - 10}}{tasks:,} tasks of three types through two workers, one of which will be killed\n"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    data_dir = Path(os.environ.get("FASTQ_DATA_DIR") or ".fastq", "demo")
    report = run(tasks, dsn, data_dir, _Terminal(console))
    _show(console, report)
    if as_json:
        print_json(_to_json(report))
    if not report.audit.is_well:
        sys.exit(1)


class _Terminal:
    """The demo's `Screen`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, what: str, text: str) -> None:
        self._console.print(f"[bold]{what:{_MARGIN}}[/]{escape(text)}")

    @contextmanager
    def working(self, what: str, text: str) -> Iterator[None]:
        with self._console.status(f"[bold]{what:{_MARGIN - 2}}[/]{escape(text)}"):
            yield

    @contextmanager
    def counting(self, what: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        progress = Progress(
            TextColumn(f"[bold]{what:{_MARGIN - 1}}[/]"),
            BarColumn(bar_width=20),
            TextColumn(f"{{task.completed:,}} of {{task.total:,}} {unit}"),
            TimeElapsedColumn(),
            _Note(),
            console=self._console,
            transient=True,
            speed_estimate_period=3,
        )
        with progress:
            bar = progress.add_task("", total=total, note="")

            def show(done: int, note: str) -> None:
                progress.update(bar, completed=done, note=note)

            yield show


class _Note(ProgressColumn):
    """What there is to say, else how many a second it is lately."""

    def render(self, task: Bar) -> Text:
        if note := task.fields["note"]:
            return Text(note, style="yellow", no_wrap=True)
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="cyan")


# --- at the end ----------------------------------------------------------------------------------


def _show(console: Console, report: Report) -> None:
    found = report.audit
    console.print(Padding(_make_table(found.types), (0, 0, 0, 2)))
    for what, text in zip(("The kill", ""), _describe_kill(found.kill), strict=False):
        _line(console, what, text)
    rates = [
        f"{name} {rate:,.0f}/s"
        for name, rate in (
            ("enqueue", report.tasks / report.enqueue_s),
            ("two workers", found.rates.both),
            ("one worker", found.rates.one),
        )
        if rate is not None
    ]
    _line(console, "Tasks/s", " · ".join(rates))
    _line(
        console,
        "Time",
        f"enqueue {report.enqueue_s:.1f} s · run {report.run_s:.1f} s · everything {report.total_s:.1f} s",
    )
    console.print()
    if found.is_well:
        console.print(
            f"[bold green]✓ {report.tasks:,} lines, {report.tasks:,} tasks that ended as they should, none lost[/]\n"
        )
        return
    for what, lines in found.problems.items():
        named = ", ".join(str(line) for line in lines[:_NAMED]) + (", …" if len(lines) > _NAMED else "")
        console.print(f"[red]✗ {_count(len(lines))}: {escape(what)} (line {named})[/]")
    wrong = sum(each.wrong for each in found.types.values())
    console.print(
        f"[bold red]✗ of {_count(report.tasks)} {found.lost:,} lost, {wrong:,} otherwise not as they should be[/]"
    )
    if report.kept is not None:
        folder, schema = report.kept
        console.print(f"  kept for a look: folder {escape(str(folder))}, schema {schema}\n")


def _make_table(types: dict[str, TypeReport]) -> Table:
    columns: dict[str, str] = {
        "lines": "lines",
        "completed": "completed",
        "failed": "planned\nfailures",
        "lost": "lost",
        "wrong": "other\nfaults",
        "runs": "runs",
        "retries": "retries",
        "reruns": "re-runs",
    }
    if not any(each.wrong for each in types.values()):
        # Seldom needed, and without it the table fits into 80 columns.
        del columns["wrong"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("\ntype", style="bold")
    for name, title in columns.items():
        table.add_column(title if "\n" in title else f"\n{title}", justify="right", style=_STYLES.get(name, ""))
    total = TypeReport()
    for type_, each in sorted(types.items(), key=lambda item: -item[1].lines):
        table.add_row(type_, *(_number(name, getattr(each, name)) for name in columns))
        for name in columns:
            setattr(total, name, getattr(total, name) + getattr(each, name))
    table.add_section()
    table.add_row("all", *(_number(name, getattr(total, name)) for name in columns))
    return table


def _number(name: str, value: int) -> Text:
    if name in ("lost", "wrong"):
        return Text(f"{value:,}", style="bold red" if value else "bold green")
    return Text(f"{value:,}" if value else "·", style="" if value else "dim")


def _describe_kill(kill: KillReport) -> list[str]:
    if not kill.held:
        return ["the worker held no task when it was killed"]
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (kill.cut_off, "cut off in a run"),
            (kill.untold, "done but not yet recorded"),
            (kill.ahead, "claimed ahead"),
        )
        if number
    ]
    again = f"{kill.run_again:,} of them" if kill.run_again < kill.held else "all of them"
    when = f", the last one {kill.within:.1f} s after the kill" if kill.within is not None else ""
    return [f"the worker held {kill.held:,} tasks: {', '.join(parts)}", f"{again} ran again{when}"]


def _count(lines: int) -> str:
    return f"{lines:,} line{'' if lines == 1 else 's'}"


def _line(console: Console, what: str, text: str) -> None:
    console.print(f"[bold]{what:{_MARGIN}}[/]{escape(text)}")


def _to_json(report: Report) -> dict[str, Any]:
    found = report.audit
    return {
        "ok": found.is_well,
        "fastq": _engine.version,
        "postgresql": report.server,
        "tasks": report.tasks,
        "lost": found.lost,
        "types": {type_: asdict(each) for type_, each in found.types.items()},
        "kill": asdict(found.kill),
        "enqueue_tasks_per_s": report.tasks / report.enqueue_s,
        "two_workers_tasks_per_s": found.rates.both,
        "one_worker_tasks_per_s": found.rates.one,
        "enqueue_s": report.enqueue_s,
        "run_s": report.run_s,
        "total_s": report.total_s,
        "problems": {what: {"lines": len(lines), "first": lines[:_NAMED]} for what, lines in found.problems.items()},
    }


__all__ = ["demo"]
