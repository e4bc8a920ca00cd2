-- Forget tasks that ended badly, at most $6 at a time; only the leader ($1, term $2). A queue ($4; NULL: all that are not named) keeps
-- those that ended as $3 for $5 seconds. Answers how many went. Lane by lane, so that what is kept for longer is not read.
WITH rules AS MATERIALIZED (
    SELECT l.id AS lane, k.state, k.seconds
      FROM fastq.lane l,
           LATERAL (SELECT DISTINCT ON (r.state) r.state, r.seconds FROM unnest($3::text[], $4::text[], $5::double precision[]) AS r (state, queue, seconds)
                     WHERE r.queue IS NULL OR r.queue = l.queue ORDER BY r.state, r.queue NULLS LAST) k
     WHERE EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
), gone AS (
    DELETE FROM fastq.dead WHERE id = ANY (ARRAY (
        SELECT old.id
          FROM rules r, LATERAL (SELECT d.id FROM fastq.dead d
                                  WHERE d.lane = r.lane AND d.state = r.state AND d.ended_at < statement_timestamp() - r.seconds * interval '1 second'
                                  ORDER BY d.ended_at LIMIT $6::bigint FOR UPDATE SKIP LOCKED) old
         LIMIT $6)) RETURNING id
)
SELECT count(*) AS tasks FROM gone
