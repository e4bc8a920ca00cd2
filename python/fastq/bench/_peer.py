"""The shape that fastq's cost is compared with: asynqpg's, one wide row a task that each move updates."""

from __future__ import annotations

from typing import Final

from fastq._db import Database

#: Its table and indexes, of its only migration.
_TABLES: Final = """
CREATE TABLE fastq.asynqpg_tasks (
    id                bigserial PRIMARY KEY,
    type              varchar(255) NOT NULL,
    idempotency_token text,
    payload           bytea NOT NULL,
    status            varchar(50) NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    messages          text[] NOT NULL DEFAULT '{}',
    blocked_till      timestamptz NOT NULL,
    attempts_left     smallint NOT NULL,
    attempts_elapsed  smallint NOT NULL DEFAULT 0,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    finalized_at      timestamptz,
    attempted_at      timestamptz
) WITH (fillfactor = 90);
CREATE UNIQUE INDEX asynqpg_tasks_idempotency_idx ON fastq.asynqpg_tasks (type, idempotency_token) WHERE idempotency_token IS NOT NULL;
CREATE INDEX asynqpg_tasks_ready_idx ON fastq.asynqpg_tasks (type, blocked_till) WHERE status IN ('pending', 'running');
CREATE INDEX asynqpg_tasks_failed_idx ON fastq.asynqpg_tasks (type) WHERE status = 'failed';
CREATE INDEX asynqpg_tasks_finalized_idx ON fastq.asynqpg_tasks (status, finalized_at) WHERE status IN ('completed', 'failed', 'cancelled');
CREATE INDEX asynqpg_tasks_stuck_idx ON fastq.asynqpg_tasks (attempted_at, id) WHERE status = 'running'
"""
#: As many tasks of that payload, due one after the other, as if each had been enqueued by itself.
_FILL: Final = """
INSERT INTO fastq.asynqpg_tasks (type, payload, blocked_till, attempts_left)
SELECT $1::text, $2::bytea, now() - ($3::bigint - g) * interval '1 microsecond', 3 FROM generate_series(1, $3) g
"""
_FETCH: Final = """
UPDATE fastq.asynqpg_tasks
   SET status = 'running', blocked_till = now() + $3::interval, attempted_at = now(), updated_at = now()
 WHERE id IN (SELECT id FROM fastq.asynqpg_tasks
               WHERE type = $1::varchar AND blocked_till <= now() AND status IN ('pending', 'running')
               ORDER BY blocked_till LIMIT $2::bigint FOR NO KEY UPDATE SKIP LOCKED)
RETURNING id, type, payload, idempotency_token, attempts_left, attempts_elapsed, created_at, messages, attempted_at
"""
_COMPLETE: Final = """
UPDATE fastq.asynqpg_tasks SET status = 'completed', finalized_at = now(), updated_at = now()
 WHERE id = ANY ($1::bigint[]) AND status = 'running'
"""
_COUNT: Final = "SELECT status, count(*) FROM fastq.asynqpg_tasks GROUP BY status"
#: A handler's time and a margin.
_LEASE: Final = "35 seconds"


class Peer:
    """Its table in a benchmark's schema, and what one worker says to it. Statements are prepared, each is a transaction of its own.

    Args:
        db: for all of it, and for nothing else.
        type_: of the tasks.
    """

    def __init__(self, db: Database, type_: str) -> None:
        self._db = db
        self._type = type_
        db.script(_TABLES)
        db.keep_statements()

    def fill(self, tasks: int, payload: bytes) -> None:
        """Enqueue so many more. Raises DatabaseError."""
        self._db.run(_FILL, self._type, payload, tasks)

    def fetch(self) -> int:
        """Claim the task that is due first, and give its id. Raises DatabaseError."""
        [row] = self._db.run(_FETCH, self._type, 1, _LEASE)
        return int(row[0])

    def complete(self, id_: int) -> None:
        """It is done. Raises DatabaseError."""
        self._db.run(_COMPLETE, [id_])

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state. Raises DatabaseError."""
        return {state: int(tasks) for state, tasks in self._db.run(_COUNT)}


__all__ = ["Peer"]
