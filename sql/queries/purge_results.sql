-- Forget results whose time is over, at most $3 at a time; only the leader ($1, term $2). Answers how many.
WITH gone AS (
    DELETE FROM fastq.result WHERE id = ANY (ARRAY (
        SELECT id FROM fastq.result
         WHERE expires_at < statement_timestamp() AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
         ORDER BY expires_at LIMIT $3::bigint FOR UPDATE SKIP LOCKED)) RETURNING id
)
SELECT count(*) AS results FROM gone
