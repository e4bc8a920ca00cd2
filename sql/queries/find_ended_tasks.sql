-- After a flush whose answer was lost: which of these ids did this consumer end itself under this claim?
-- $1 consumer, $2 claims, $3 ids, element by element. The rescuer's own note of a loss (no run time) is none of it. OFFSET 0: else PostgreSQL 18 reads all errors into a hash.
-- A snooze leaves no other trace than the task that waits: once that is ready again, it counts as refused.
SELECT s.no, s.id FROM unnest($2::bigint[], $3::bigint[]) AS s (no, id)
 WHERE EXISTS (SELECT FROM fastq.done d WHERE d.lo BETWEEN s.id - 1023 AND s.id AND d.ids @> s.id AND d.consumer = $1::bigint AND d.no = s.no OFFSET 0)
    OR EXISTS (SELECT FROM fastq.attempt_error e WHERE e.id = s.id AND e.consumer = $1 AND e.no = s.no AND e.took_us IS NOT NULL OFFSET 0)
    OR EXISTS (SELECT FROM fastq.delayed w WHERE w.id = s.id AND w.kind = 'scheduled' OFFSET 0)
