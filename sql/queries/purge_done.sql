-- Forget completed tasks of leaf $3 whose queue ($4; NULL: all that are not named) keeps them for $5 seconds, which is less than their leaf
-- stays: looks at the next $6 completions after task $7, until 5,000 tasks or a little more are due; only the leader ($1, term $2). Answers
-- how many tasks went, the last it looked at, whether there are more behind it, and the first that will have to go but is not due yet.
-- What somebody holds is passed by: upkeep waits for nobody's transaction.
WITH rules AS MATERIALIZED (
    SELECT l.id AS lane, k.seconds
      FROM fastq.lane l,
           LATERAL (SELECT r.seconds FROM unnest($4::text[], $5::double precision[]) AS r (queue, seconds)
                     WHERE r.queue IS NULL OR r.queue = l.queue ORDER BY r.queue NULLS LAST LIMIT 1) k
     WHERE EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
), seen AS MATERIALIZED (
    SELECT lo, lane, done_at, ids FROM fastq.done
     WHERE leaf = $3::smallint AND lo > $7::bigint AND EXISTS (SELECT FROM rules) ORDER BY lo LIMIT $6::bigint
), judged AS MATERIALIZED (
    SELECT s.lo, s.ids, r.seconds IS NOT NULL AND s.done_at < statement_timestamp() - r.seconds * interval '1 second' AS is_old,
           r.seconds IS NOT NULL AS is_short
      FROM seen s LEFT JOIN rules r ON r.lane = s.lane AND r.seconds < 'infinity'
), sized AS MATERIALIZED (
    SELECT lo, ids, is_old, is_short,
           (sum(CASE WHEN is_old THEN n ELSE 0 END) OVER (ORDER BY lo))::bigint - CASE WHEN is_old THEN n ELSE 0 END AS before
      FROM judged, LATERAL (SELECT (sum(upper(i) - lower(i)))::bigint AS n FROM unnest(ids) i) one
), old AS MATERIALIZED (
    SELECT lo FROM fastq.done
     WHERE leaf = $3 AND lo = ANY (ARRAY (SELECT lo FROM sized WHERE is_old AND before < 5000)) FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM fastq.done WHERE leaf = $3 AND lo = ANY (ARRAY (SELECT lo FROM old)) RETURNING ids
), content AS (
    DELETE FROM fastq.task WHERE leaf = $3
       AND id = ANY (ARRAY (SELECT i FROM gone, unnest(gone.ids) r, generate_series(lower(r), upper(r) - 1) i)) RETURNING id
)
SELECT (SELECT count(*) FROM content) AS tasks, max(lo) FILTER (WHERE before < 5000) AS last_id,
       count(*) = $6 OR coalesce(bool_or(before >= 5000), false) AS more, min(lo) FILTER (WHERE is_short AND NOT is_old AND before < 5000) AS first_kept
  FROM sized
