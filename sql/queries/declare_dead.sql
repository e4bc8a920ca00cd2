-- Those consumers of $4 that were silent for $3 seconds are dead; only the leader ($1, term $2) says so.
UPDATE fastq.consumer SET dead_at = clock_timestamp()
 WHERE id = ANY ($4::bigint[]) AND dead_at IS NULL AND beat_at < statement_timestamp() - $3::double precision * interval '1 second'
   AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
RETURNING id, host, pid, extract(epoch FROM clock_timestamp() - beat_at)::double precision AS silent
