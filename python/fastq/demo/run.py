"""All of the demo, in order."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fastq import embedded, migrations
from fastq._db import Database
from fastq.demo import commands, tasks
from fastq.demo.audit import Audit, Kill, audit
from fastq.demo.commands import DemoError, Worker
from fastq.demo.load import read_plan, write_file
from fastq.demo.runlog import read_runs
from fastq.demo.service import Service
from fastq.demo.tables import Consumer, Counts, Tables
from fastq.errors import FastqError

#: Seconds that the service lets an echo wait.
_WAIT: Final = 0.002
#: Seconds between two looks at the tables: until the kill, which is to come in time, and after it.
_LOOK: Final = 0.02
_LATER_LOOK: Final = 0.1
#: Seconds without any change in the tables after which the demo waits no longer.
_STALL: Final = 60.0
_WORKERS: Final = 2


class Screen(Protocol):
    """Where the demo shows what it does."""

    def say(self, what: str, text: str) -> None:
        """Something is done, or known."""

    def working(self, what: str, text: str) -> AbstractContextManager[None]:
        """Something takes a while."""

    def counting(self, what: str, total: int, unit: str) -> AbstractContextManager[Callable[[int, str], None]]:
        """Something is counted; gives the function to say how far it is, with a note."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo has found. Durations are seconds."""

    tasks: int
    server: str
    """PostgreSQL's version."""
    enqueue_s: float
    """From the start of ``fastq enqueue`` to its end."""
    run_s: float
    """From the start of the workers until all tasks had ended."""
    total_s: float
    audit: Audit
    kept: tuple[Path, str] | None
    """Where something is wrong: the folder with the file, the run logs and the workers' logs, and the schema, both kept."""


def run(count: int, dsn: str | None, data_dir: Path, screen: Screen) -> Report:
    """Run the demo. Whatever ends it, it leaves no process, schema or file behind, unless `Report.kept` says so.

    Args:
        count: tasks.
        dsn: the database; None: a private PostgreSQL, with its data in ``data_dir``.
        data_dir: see ``dsn``.
        screen: shows it.

    Raises:
        DemoError: a process of the demo failed.
        FastqError: the database failed.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        if dsn is None:
            with screen.working("PostgreSQL", f"starts, with its data in {data_dir}"):
                dsn = stack.enter_context(embedded.start(data_dir)).dsn
        schema = f"fastq_demo_{secrets.token_hex(4)}"
        folder = Path(tempfile.mkdtemp(prefix="fastq-demo-"))
        remove = ExitStack()
        stack.push(remove)
        remove.callback(shutil.rmtree, folder, ignore_errors=True)
        remove.push(_drop(dsn, schema))
        migrations.migrate(dsn, schema=schema)
        stage = _Stage(count, dsn, schema, folder, screen)
        tables = stack.enter_context(Tables(dsn, schema))
        version, durable = tables.server()
        screen.say("PostgreSQL", f"{version}, with {', '.join(durable) or 'no durability'} on; schema {schema}")
        service = stack.enter_context(Service(_WAIT))
        path, enqueue_s = stage.enqueue()
        run_started = time.monotonic()
        kill = stage.work(tables, service)
        run_s = time.monotonic() - run_started
        with screen.working("Audit", "compares the file, the tables and what the handlers wrote down"):
            found = audit(read_plan(path), tables.found(), read_runs(folder), kill)
        kept = None
        if not found.is_well:
            remove.pop_all()
            kept = (folder, schema)
        return Report(count, version, enqueue_s, run_s, time.monotonic() - started, found, kept)


def _drop(dsn: str, schema: str) -> Callable[[type[BaseException] | None, BaseException | None, object], None]:
    def leave(_: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        try:
            with Database(dsn, schema, statement_timeout=None) as db:
                db.drop_schema()
        except FastqError:
            # Where the database is what failed, that is the story to tell.
            if error is None:
                raise

    return leave


class _Stage:
    """What the parts of a run share."""

    def __init__(self, count: int, dsn: str, schema: str, folder: Path, screen: Screen) -> None:
        self._count = count
        self._folder = folder
        self._screen = screen
        self._env = {"FASTQ_DSN": dsn, "FASTQ_SCHEMA": schema}

    def enqueue(self) -> tuple[Path, float]:
        """Write the file and enqueue it; gives the file and the seconds that the enqueueing took."""
        path = self._folder / "tasks.jsonl"
        with self._screen.counting("File", self._count, "lines") as show:
            write_file(path, self._count, lambda line: show(line, ""))
        self._screen.say("File", f"{path}: {self._count:,} lines, {path.stat().st_size / 1e6:.1f} MB")
        self._screen.say("Enqueue", f"$ fastq enqueue --file {path}")
        started = time.monotonic()
        answer = commands.enqueue(path, self._env)
        took = time.monotonic() - started
        if answer["enqueued"] != self._count:
            raise DemoError(f"fastq enqueue wrote {answer['enqueued']:,} of {self._count:,} tasks")
        self._screen.say("", f"{self._count:,} tasks in {took:.1f} s, {self._count / took:,.0f} tasks/s")
        return path, took

    def work(self, tables: Tables, service: Service) -> Kill:
        """Run two workers, kill one when half the tasks have ended, and wait until all have."""
        env = {
            **self._env,
            tasks.FOLDER: str(self._folder),
            tasks.SLOTS: str(3 * self._count),
            tasks.SERVICE: f"{service.host}:{service.port}",
        }
        self._screen.say("Work", f"$ fastq worker {commands.APP}    (twice)")
        with ExitStack() as stack:
            workers = []
            for number in range(1, _WORKERS + 1):
                worker = Worker(number, self._folder / f"worker-{number}.log", env)
                stack.callback(worker.give_up)
                workers.append(worker)
            with self._screen.counting("", self._count, "tasks") as show:
                ended = 0
                for counts in self._looks(tables, workers, _LOOK):
                    ended = counts.ended
                    show(ended, "")
                    if ended * 2 >= self._count:
                        break
                victim, survivor, consumer = _choose(workers, tables.consumers())
                killed_at = time.time()
                victim.kill()
                self._screen.say(
                    "", f"SIGKILL to worker {victim.number} (process {victim.pid}), with {ended:,} tasks ended"
                )
                held: set[int] = set()
                for counts in self._looks(tables, [survivor], _LATER_LOOK):
                    # What it had sent before its death may still be under way in the server: look as long as it holds any.
                    now = tables.held_by(consumer.id)
                    held |= now
                    show(counts.ended, _describe_wait(tables, victim, len(now)) if now else "")
            survivor.stop()
        return Kill(victim.pid, consumer.id, killed_at, held)

    def _looks(self, tables: Tables, workers: list[Worker], pause: float) -> Iterator[Counts]:
        """Look at the tables, with pauses in seconds, until all tasks have ended, or nothing has changed for long."""
        last, changed_at = None, time.monotonic()
        while True:
            for worker in workers:
                worker.check()
            counts = tables.counts()
            yield counts
            if counts.waiting + counts.running == 0:
                return
            if counts != last:
                last, changed_at = counts, time.monotonic()
            elif time.monotonic() - changed_at > _STALL:
                self._screen.say(
                    "", f"nothing has changed for {_STALL:g} s: {counts.waiting:,} wait, {counts.running:,} run"
                )
                return
            time.sleep(pause)


def _choose(workers: list[Worker], consumers: dict[int, Consumer]) -> tuple[Worker, Worker, Consumer]:
    """The worker to kill, the one that holds most; and the other one."""
    known = [worker for worker in workers if worker.pid in consumers]
    if not known:
        raise DemoError("the database knows neither of the workers")
    victim = max(known, key=lambda worker: consumers[worker.pid].held)
    survivor = next(worker for worker in workers if worker is not victim)
    return victim, survivor, consumers[victim.pid]


def _describe_wait(tables: Tables, victim: Worker, held: int) -> str:
    consumer = tables.consumers().get(victim.pid)
    silence = "" if consumer is None else f", silent {consumer.silence:.0f} s"
    return f"worker {victim.number}: {held:,} to rescue{silence}"


__all__ = ["Report", "Screen", "run"]
