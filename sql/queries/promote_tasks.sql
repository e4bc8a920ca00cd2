-- Make due tasks ready, up to $3 of them, neighbours that are alike as one chunk; only the leader ($1, term $2). $4 is the open leaf:
-- what has expired meanwhile has ended; only tasks that carry their payload are written there (a second copy in the same leaf would run twice in one claim).
WITH due AS MATERIALIZED (
    SELECT id FROM fastq.delayed
     WHERE run_at <= statement_timestamp() AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY run_at LIMIT $3::bigint FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM due)) RETURNING *
), expired AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT g.id, coalesce(g.created_at, t.created_at, clock_timestamp()), g.lane, g.attempts, g.max_attempts, 'expired',
           coalesce(g.format, t.format, 'b'), coalesce(g.payload, t.payload, ''), g.expires_at
      FROM gone g LEFT JOIN LATERAL (SELECT created_at, format, payload FROM fastq.task
                                      WHERE task.leaf = g.leaf AND task.id = g.id OFFSET 0) t ON true
     WHERE g.expires_at <= statement_timestamp()
), alive AS (
    SELECT * FROM gone WHERE expires_at IS NULL OR expires_at > statement_timestamp()
), content AS (
    INSERT INTO fastq.task (id, created_at, lane, leaf, max_attempts, format, payload, expires_at)
    SELECT id, created_at, lane, $4::smallint, max_attempts, format, payload, expires_at FROM alive WHERE leaf IS NULL
), numbered AS (
    SELECT *, coalesce(leaf, $4) AS home, row_number() OVER (PARTITION BY lane, coalesce(leaf, $4), attempts, max_attempts ORDER BY id) AS n FROM alive
), runs AS (
    SELECT *, row_number() OVER (PARTITION BY lane, home, attempts, max_attempts, id - n ORDER BY id) - 1 AS k FROM numbered
), chunks AS (
    INSERT INTO fastq.ready (lane, leaf, attempts, max_attempts, task_bytes, expires_at, lo, hi)
    SELECT lane, home, attempts, max_attempts, max(task_bytes), min(expires_at), min(id), max(id)
      FROM runs GROUP BY lane, home, attempts, max_attempts, id - n, k / 500 ORDER BY min(run_at), min(id)
)
SELECT count(*) AS promoted, coalesce(array_agg(DISTINCT lane), '{}') AS lanes FROM gone
