-- Tasks that wait for a time and were not started in time have expired, up to $3 of them, those that are longest over; only the leader
-- ($1, term $2). Answers how many.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.delayed
     WHERE expires_at <= statement_timestamp() AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY expires_at LIMIT $3::bigint FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING *
), expired AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT g.id, coalesce(g.created_at, t.created_at, clock_timestamp()), g.lane, g.attempts, g.max_attempts, 'expired',
           coalesce(g.format, t.format, 'b'), coalesce(g.payload, t.payload, ''), g.expires_at
      FROM gone g LEFT JOIN LATERAL (SELECT created_at, format, payload FROM fastq.task
                                      WHERE task.leaf = g.leaf AND task.id = g.id OFFSET 0) t ON true
)
SELECT count(*) AS tasks FROM gone
