"""What the database says, by plain SQL."""

from __future__ import annotations

from typing import Final, NamedTuple, Self

from fastq._db import Database

# sum() of a bigint is numeric, hence the casts.
_COUNTS: Final = """
SELECT coalesce((SELECT sum(hi - lo + 1) FROM fastq.ready), 0)::bigint + (SELECT count(*) FROM fastq.delayed),
       coalesce((SELECT sum(upper(r) - lower(r)) FROM fastq.claim, unnest(ids) r), 0)::bigint,
       coalesce((SELECT sum(upper(r) - lower(r)) FROM fastq.done, unnest(ids) r), 0)::bigint + (SELECT count(*) FROM fastq.dead)
"""
_CONSUMERS: Final = """
SELECT pid, id, extract(epoch FROM clock_timestamp() - beat_at)::float8,
       coalesce((SELECT sum(upper(r) - lower(r)) FROM fastq.claim, unnest(ids) r WHERE consumer = c.id), 0)::bigint
  FROM fastq.consumer c
"""
_HELD: Final = """
SELECT i FROM fastq.claim, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i WHERE consumer = $1
"""
# A task's state is the table that holds its id; its content is in its leaf, or beside it.
_FOUND: Final = """
WITH kept AS (
    SELECT leaf, i AS id, 'waiting' AS state, NULL::bigint AS consumer FROM fastq.ready, generate_series(lo, hi) i
    UNION ALL
    SELECT leaf, i, 'running', consumer FROM fastq.claim, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i
    UNION ALL
    SELECT leaf, i, 'completed', consumer FROM fastq.done, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i
    UNION ALL
    SELECT leaf, id, 'waiting for another attempt', NULL FROM fastq.delayed WHERE leaf IS NOT NULL
), found AS (
    SELECT k.id, t.lane, k.state, k.consumer, t.payload FROM kept k JOIN fastq.task t ON t.leaf = k.leaf AND t.id = k.id
    UNION ALL
    SELECT id, lane, 'waiting for another attempt', NULL, payload FROM fastq.delayed WHERE leaf IS NULL
    UNION ALL
    SELECT id, lane, state, NULL, payload FROM fastq.dead
)
SELECT (convert_from(f.payload, 'UTF8')::jsonb ->> 'line')::bigint, f.id, l.type, f.state, f.consumer
  FROM found f JOIN fastq.lane l ON l.id = f.lane
"""
_SERVER: Final = """
SELECT current_setting('server_version'),
       current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')
"""


class Counts(NamedTuple):
    """How many tasks wait, run, and have ended, all at one moment."""

    waiting: int
    running: int
    """Claimed by a worker, whether their handlers run yet or not."""
    ended: int
    """Completed, or failed for good."""


class Consumer(NamedTuple):
    """A worker as the database knows it."""

    pid: int
    id: int
    silence: float
    """Seconds since its last heartbeat."""
    held: int
    """Tasks it has claimed."""


class Found(NamedTuple):
    """A task as it ended."""

    line: int
    """Its line in the file, from its payload."""
    id: int
    type: str
    state: str
    consumer: int | None
    """The worker that completed it, or runs it."""


class Tables:
    """One connection for looking. Usable as a context manager."""

    def __init__(self, dsn: str, schema: str) -> None:
        # Looking at every task takes as long as there are tasks.
        self._db = Database(dsn, schema, statement_timeout=None)
        # Compiling a statement over all leaves takes seconds, running it less than one.
        self._db.run("SET jit = off")

    def counts(self) -> Counts:
        """How many tasks wait, run, and have ended."""
        return Counts._make(self._db.run(_COUNTS)[0])

    def consumers(self) -> dict[int, Consumer]:
        """The workers by their process ids."""
        return {row[0]: Consumer._make(row) for row in self._db.run(_CONSUMERS)}

    def held_by(self, consumer: int) -> set[int]:
        """The ids of the tasks that a worker has claimed."""
        return {id_ for (id_,) in self._db.run(_HELD, consumer)}

    def found(self) -> list[Found]:
        """All tasks."""
        return [Found._make(row) for row in self._db.run(_FOUND)]

    def server(self) -> tuple[str, list[str]]:
        """The server's version, and the settings for durability that are on."""
        version, *values = self._db.run(_SERVER)[0]
        names = ("fsync", "full_page_writes", "synchronous_commit")
        return version, [name for name, value in zip(names, values, strict=True) if value == "on"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()


__all__ = ["Consumer", "Counts", "Found", "Tables"]
