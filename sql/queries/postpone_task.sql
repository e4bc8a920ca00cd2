-- Put off the due task that comes first by a minute: alone, it could not be made ready. Only the leader ($1, term $2). Answers its id.
UPDATE fastq.delayed SET run_at = clock_timestamp() + interval '1 minute'
 WHERE id = (SELECT id FROM fastq.delayed
              WHERE run_at <= statement_timestamp() AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
              ORDER BY run_at LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING id
