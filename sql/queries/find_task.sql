-- Task $1 with its state and its failed attempts. One statement is one snapshot: it is in one table, and its state is where it is found.
-- Chunks do not overlap, so the first one that ends at the id or behind it is the only one that can hold it.
WITH found AS MATERIALIZED (
    SELECT 'pending' AS state, NULL AS kind, lane, leaf, attempts, max_attempts, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at,
           NULL::timestamptz AS created_at, NULL::"char" AS format, NULL::bytea AS payload, NULL::timestamptz AS expires_at
      FROM (SELECT * FROM fastq.ready WHERE hi >= $1::bigint ORDER BY hi LIMIT 1) r WHERE lo <= $1
    UNION ALL
    SELECT 'pending', kind, lane, leaf, attempts, max_attempts, run_at, NULL, created_at, format, payload, expires_at FROM fastq.delayed WHERE id = $1
    UNION ALL
    SELECT 'running', NULL, lane, leaf, (attempts + 1)::smallint, max_attempts, NULL, NULL, NULL, NULL, NULL, NULL FROM fastq.claim WHERE ids @> $1
    UNION ALL
    SELECT 'completed', NULL, lane, leaf, attempts, NULL, NULL, done_at, NULL, NULL, NULL, NULL
      FROM fastq.done WHERE lo BETWEEN $1 - 1023 AND $1 AND ids @> $1
    UNION ALL
    SELECT state, NULL, lane, NULL, attempts, max_attempts, NULL, ended_at, created_at, format, payload, expires_at FROM fastq.dead WHERE id = $1
)
SELECT $1 AS id, l.type, l.queue, l.priority, coalesce(f.format, t.format)::text AS format, coalesce(f.payload, t.payload) AS payload,
       f.state, f.kind, f.attempts, coalesce(f.max_attempts, t.max_attempts) AS max_attempts, coalesce(f.created_at, t.created_at) AS created_at,
       f.run_at, f.ended_at, coalesce(f.expires_at, t.expires_at) AS expires_at, e.attempts, e.failed_ats, e.tooks, e.errors, e.tracebacks
  FROM found f JOIN fastq.lane l ON l.id = f.lane
       LEFT JOIN LATERAL (SELECT created_at, max_attempts, format, payload, expires_at FROM fastq.task
                           WHERE task.leaf = f.leaf AND task.id = $1 OFFSET 0) t ON true,
       LATERAL (SELECT coalesce(array_agg(attempt ORDER BY failed_at), '{}') AS attempts, coalesce(array_agg(failed_at ORDER BY failed_at), '{}') AS failed_ats,
                       coalesce(array_agg(took_us ORDER BY failed_at), '{}') AS tooks, coalesce(array_agg(error ORDER BY failed_at), '{}') AS errors,
                       coalesce(array_agg(traceback ORDER BY failed_at), '{}') AS tracebacks
                  FROM fastq.attempt_error WHERE attempt_error.id = $1) e
