-- Forget tasks that ended badly more than $3 seconds ago, at most $4 at a time; only the leader ($1, term $2). Answers how many.
WITH gone AS (
    DELETE FROM fastq.dead WHERE id = ANY (ARRAY (
        SELECT id FROM fastq.dead
         WHERE ended_at < statement_timestamp() - $3::double precision * interval '1 second'
           AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
         ORDER BY ended_at LIMIT $4::bigint FOR UPDATE SKIP LOCKED)) RETURNING id
)
SELECT count(*) AS tasks FROM gone
