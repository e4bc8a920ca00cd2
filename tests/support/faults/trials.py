"""Repeats of one fault, several at a time, each in a schema of its own; and the table of what the worst of them showed."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg
from psycopg import sql

from fastq.migrations import migrate
from tests.support.lab import Lab

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast things go: fastq's own defaults, or a quicker choice for those who don't want to wait. Durations are seconds."""

    settings: dict[str, Any]
    """Of all consumers, beside the defaults."""
    heartbeat: float = 3.0
    dead_after: float = 9.0
    lease: float = 6.0
    again_within: float = 15.0
    """From the death of a worker until all that it held runs again, at most."""
    stop: float = 30.0
    """How long a process that is stopped stands still: longer than heartbeat, dead time and lease."""
    late: float = 1.0
    """From the time of a delayed task until it runs, at most."""


DEFAULTS: Final = Pace({})
QUICK: Final = Pace(
    {"heartbeat_interval": 0.5, "dead_after": 2.0, "lease": 1.2, "poll_interval": 0.3},
    heartbeat=0.5,
    dead_after=2.0,
    lease=1.2,
    again_within=15.0,
    stop=4.0,
    late=5.0,  # other tests have the machine, too
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One repeat."""

    lab: Lab
    pace: Pace
    number: int
    """From 0."""

    @property
    def rnd(self) -> random.Random:
        """Random numbers that are the same for each trial of that number."""
        return random.Random(self.number)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    what: str
    repeats: int
    worst: str


@dataclass(slots=True)
class Rows:
    """The table."""

    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, repeats: int, worst: str = "") -> None:
        """What was shown, how often, and the worst figure of all repeats."""
        self.rows.append(Row(what, repeats, worst))

    def lines(self) -> Iterator[str]:
        """The table as text, in the order of names."""
        width = max((len(row.what) for row in self.rows), default=0)
        yield f"{'fault':{width}}  repeats  worst"
        for row in sorted(self.rows, key=lambda row: row.what):
            yield f"{row.what:{width}}  {row.repeats:7}  {row.worst}"


def repeat(what: str, body: Callable[[int], _T], times: int, at_once: int) -> list[_T]:
    """Calls ``body`` with the numbers from 0, so many at a time. Gives what it gave.

    Raises:
        AssertionError: one failed; the others that were under way are waited for, no more are begun.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(body, number) for number in range(times)]
        _, left = wait(futures, return_when=FIRST_EXCEPTION)
        for future in left:
            future.cancel()
    ended = [future for future in futures if not future.cancelled()]
    for number, future in enumerate(ended):
        if error := future.exception():
            error.add_note(f"{what}: trial {number} of {times}")
            raise error
    return [future.result() for future in ended]


class Trials:
    """Runs repeats of a fault.

    Args:
        dsn: of the server that they share.
        folder: for their files.
        pace: for all of them.
        repeats: how many.
        at_once: how many of them at a time; most of a trial is waiting for a death to be noticed.
        rows: gets a line for each fault.
    """

    def __init__(self, dsn: str, folder: Path, pace: Pace, repeats: int, at_once: int, rows: Rows) -> None:
        self._dsn = dsn
        self._folder = folder
        self._pace = pace
        self._repeats = repeats
        self._at_once = at_once
        self._rows = rows

    def run(self, what: str, body: Callable[[Trial], float | None], *, unit: str = "s", share: int = 1) -> None:
        """Calls ``body`` with a trial, again and again. It gives the trial's figure, or None where there is none.

        Args:
            what: the fault's name in the table.
            body: fails where it finds something wrong.
            unit: of its figure.
            share: this is one of so many choices of the same fault that share the repeats.

        Raises:
            AssertionError: a trial failed; the others that were under way are waited for, no more are begun.
        """
        repeats = -(-self._repeats // share)
        results = repeat(what, lambda number: self._try(body, number), repeats, self._at_once)
        figures = [figure for figure in results if figure is not None]
        self._rows.add(what, repeats, f"{max(figures):.1f} {unit}" if figures else "")

    def _try(self, body: Callable[[Trial], float | None], number: int) -> float | None:
        folder = self._folder / f"trial-{number}"
        folder.mkdir()
        with self._schema() as (schema, db), Lab(self._dsn, schema, db, folder, self._pace.settings) as lab:
            return body(Trial(lab, self._pace, number))

    @contextmanager
    def _schema(self) -> Iterator[tuple[str, psycopg.Connection]]:
        schema = f"test_{secrets.token_hex(6)}"
        migrate(self._dsn, schema=schema)
        with psycopg.connect(self._dsn, autocommit=True) as db:
            db.execute("SELECT pg_catalog.set_config('search_path', %s, false)", [schema])
            db.execute("SET jit = off")
            db.execute("SET lock_timeout = '10s'")
            try:
                yield schema, db
            finally:
                db.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
