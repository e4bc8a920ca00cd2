-- Cancel those of tasks $1 that wait for a time and whose kind is in $2. Answers their ids. The rows are taken as the lock found them: a
-- leader may have put their content into them meanwhile, so that they no longer name their leaf.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.delayed WHERE id = ANY ($1::bigint[]) AND kind = ANY ($2::text[]) ORDER BY id FOR UPDATE
), gone AS MATERIALIZED (
    DELETE FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING *
), kept AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT g.id, coalesce(g.created_at, t.created_at, clock_timestamp()), g.lane, g.attempts, g.max_attempts, 'cancelled',
           coalesce(g.format, t.format, 'b'), coalesce(g.payload, t.payload, ''), coalesce(g.expires_at, t.expires_at)
      FROM gone g LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                                      WHERE task.leaf = g.leaf AND task.id = g.id OFFSET 0) t ON true
)
SELECT id FROM gone
