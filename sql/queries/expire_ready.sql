-- Tasks that wait in chunks and were not started in time have expired: of up to $3 chunks, those that are longest over; only the leader
-- ($1, term $2). Answers how many chunks, and how many of their tasks. A chunk is deleted and what is left of it born again with the same
-- rid, as in cancel_ready.sql, now with the time of the earliest that is left. A task without content stays, for its claim to tell.
WITH locked AS MATERIALIZED (
    SELECT hi FROM fastq.ready
     WHERE expires_at <= statement_timestamp() AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY expires_at LIMIT $3::bigint FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT hi FROM locked)) RETURNING *
), tasks AS MATERIALIZED (
    SELECT i AS id, g.rid, g.hi, g.lane, g.track, g.leaf, g.attempts, g.max_attempts, g.task_bytes, t.created_at, t.format, t.payload, t.expires_at,
           coalesce(t.expires_at <= statement_timestamp(), false) AS is_over
      FROM gone g, generate_series(g.lo, g.hi) i
           LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                               WHERE task.leaf = g.leaf AND task.id = i OFFSET 0) t ON true
), expired AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT id, created_at, lane, attempts, max_attempts, 'expired', format, payload, expires_at FROM tasks WHERE is_over
), pieces AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT rid, min(id), max(id), lane, track, leaf, attempts, max_attempts, task_bytes, min(expires_at)
      FROM (SELECT *, id - row_number() OVER (PARTITION BY hi ORDER BY id) AS run FROM tasks WHERE NOT is_over) r
     GROUP BY rid, hi, run, lane, track, leaf, attempts, max_attempts, task_bytes
)
SELECT (SELECT count(*) FROM gone) AS chunks, count(*) FILTER (WHERE is_over) AS tasks FROM tasks
