-- Delayed tasks of leaf $3 take their content with them, at most $4 at a time; only the leader ($1, term $2). Answers how many did.
-- One without content (someone deleted it by hand) has failed: it would keep the leaf for ever.
WITH picked AS MATERIALIZED (
    SELECT id FROM fastq.delayed
     WHERE leaf = $3::smallint AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     LIMIT $4::bigint FOR UPDATE SKIP LOCKED
), content AS MATERIALIZED (
    SELECT p.id, t.created_at, t.format, t.payload, t.expires_at
      FROM picked p LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                                        WHERE task.leaf = $3 AND task.id = p.id OFFSET 0) t ON true
), carried AS (
    UPDATE fastq.delayed d SET leaf = NULL, created_at = c.created_at, format = c.format, payload = c.payload, expires_at = c.expires_at
      FROM content c WHERE d.id = c.id AND d.id = ANY (ARRAY (SELECT id FROM picked)) AND c.payload IS NOT NULL
), lost AS (
    DELETE FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM content WHERE payload IS NULL)) RETURNING *
), failed AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload)
    SELECT id, clock_timestamp(), lane, attempts, max_attempts, 'failed', 'b', '' FROM lost
)
SELECT count(*) AS tasks, count(*) FILTER (WHERE payload IS NULL) AS failed FROM content
