"""A producer's core by itself, and what the tables say of its tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import psycopg

from fastq._engine import EnqueuedIds, ProducerCore
from fastq.settings import ProducerSettings

T = TypeVar("T")


@contextmanager
def producing(dsn: str, schema: str, **settings: Any) -> Iterator[ProducerCore]:
    """A core that is closed at the end."""
    core = ProducerCore(ProducerSettings(dsn=dsn, schema=schema, **settings))
    try:
        yield core
    finally:
        core.close()


def answers(ids: EnqueuedIds) -> list[tuple[int, bool]]:
    """All of them."""
    return [ids.get(n) for n in range(len(ids))]


@dataclass(frozen=True, slots=True)
class Stored:
    """A task as the view shows it."""

    id: int
    type: str
    queue: str
    kind: str | None
    max_attempts: int
    payload: str


def stored(db: psycopg.Connection) -> dict[int, Stored]:
    """The waiting tasks by id. Fails where one is shown twice."""
    rows = db.execute(
        "SELECT id, type, queue, kind, max_attempts, payload FROM tasks WHERE state = 'pending'"
    ).fetchall()
    found = {row[0]: Stored(*row) for row in rows}
    assert len(found) == len(rows), "a task is there twice"
    return found


def count(db: psycopg.Connection) -> int:
    """How many tasks were written, waiting or not."""
    counted = value(db, "SELECT (SELECT count(*) FROM task) + (SELECT count(*) FROM delayed WHERE payload IS NOT NULL)")
    assert isinstance(counted, int)
    return counted


def value(db: psycopg.Connection, statement: str) -> Any:
    """The only value of a statement."""
    row = db.execute(statement).fetchone()
    assert row is not None
    return row[0]


def check_chunks(db: psycopg.Connection) -> None:
    """Every chunk's ids are tasks of its lane and leaf, each task lies in one chunk at most, and the limits are kept."""
    assert value(db, "SELECT count(*) FROM ready WHERE hi - lo >= 500") == 0
    assert (
        value(db, "SELECT count(*) FROM ready WHERE task_bytes::bigint * (hi - lo + 1) > 1024 * 1024 AND hi > lo") == 0
    )
    missing = value(
        db,
        """SELECT count(*) FROM ready r, generate_series(r.lo, r.hi) AS g (id)
            WHERE NOT EXISTS (SELECT FROM task t WHERE t.id = g.id AND t.leaf = r.leaf AND t.lane = r.lane
                                 AND t.max_attempts = r.max_attempts)""",
    )
    assert missing == 0
    assert value(db, "SELECT coalesce(sum(hi - lo + 1), 0) FROM ready") == value(db, "SELECT count(*) FROM task")
    assert (
        value(db, "SELECT count(*) FROM ready a JOIN ready b ON a.lo <= b.hi AND b.lo <= a.hi AND a.rid < b.rid") == 0
    )


class Background(Generic[T]):
    """A call in a thread of its own; `result` waits for it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._call())
        except BaseException as error:  # noqa: BLE001 raised where the result is asked for
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout: float = 30.0) -> T:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"no answer within {timeout:g} s"
        if self._error is not None:
            raise self._error
        return self._value[0]


def gather(calls: Iterable[Callable[[], T]], timeout: float = 60.0) -> list[T]:
    """Runs all of them at once, each in a thread."""
    return [each.result(timeout) for each in [Background(call) for call in calls]]
