-- As purge_done.sql, with archived tasks: completed tasks of leaf $3 whose queue ($4; NULL: all that are not named) keeps them for $5 seconds
-- (infinite: they are not looked at) go, and where $8 says so, into the archive: looks at the next $6 completions after task $7, until 2,000
-- tasks or 8 MiB of payloads are due; only the leader ($1, term $2). Answers as that one does. $9: their contents go one by one, too; else they
-- stay for the leaf to be emptied. It is the completion's row that makes it once: who deletes it archives its tasks, in the same statement.
-- What somebody holds is passed by: upkeep waits for nobody's transaction.
WITH rules AS MATERIALIZED (
    SELECT l.id AS lane, l.type, l.queue, l.priority, k.seconds, k.is_archived
      FROM fastq.lane l,
           LATERAL (SELECT r.seconds, r.is_archived FROM unnest($4::text[], $5::double precision[], $8::boolean[]) AS r (queue, seconds, is_archived)
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
    SELECT lo, is_old, is_short,
           (sum(CASE WHEN is_old THEN n ELSE 0 END) OVER (ORDER BY lo))::bigint - CASE WHEN is_old THEN n ELSE 0 END AS before
      FROM judged, LATERAL (SELECT (sum(upper(i) - lower(i)))::bigint AS n FROM unnest(ids) i) one
), locked AS MATERIALIZED (
    SELECT lo, ids FROM fastq.done
     WHERE leaf = $3 AND lo = ANY (ARRAY (SELECT lo FROM sized WHERE is_old AND before < 2000)) FOR UPDATE SKIP LOCKED
), content AS MATERIALIZED (
    SELECT l.lo, t.*
      FROM locked l, unnest(l.ids) i, LATERAL (SELECT id, created_at, max_attempts, format, payload FROM fastq.task
                                                WHERE task.leaf = $3 AND task.id >= lower(i) AND task.id < upper(i) OFFSET 0) t
), weighed AS MATERIALIZED (
    SELECT lo, (sum(bytes) OVER (ORDER BY lo))::bigint - bytes AS before
      FROM (SELECT l.lo, coalesce(sum(octet_length(c.payload)), 0)::bigint AS bytes FROM locked l LEFT JOIN content c ON c.lo = l.lo GROUP BY l.lo) b
), gone AS MATERIALIZED (
    DELETE FROM fastq.done WHERE leaf = $3 AND lo = ANY (ARRAY (SELECT lo FROM weighed WHERE before < 8388608)) RETURNING lo, lane, done_at, attempts
), ended AS MATERIALIZED (
    SELECT g.lane, g.done_at, g.attempts, c.id, c.created_at, c.max_attempts, c.format, c.payload FROM gone g JOIN content c ON c.lo = g.lo
), emptied AS (
    DELETE FROM fastq.task WHERE $9::boolean AND leaf = $3 AND id = ANY (ARRAY (SELECT id FROM ended))
), archived AS (
    INSERT INTO fastq.archive (id, type, queue, priority, state, attempts, max_attempts, created_at, ended_at, format, payload, error)
    SELECT e.id, r.type, r.queue, r.priority, 'completed', e.attempts, e.max_attempts, e.created_at, e.done_at,
           -- What a task said of its own runs (formats J and B) ends with it.
           CASE e.format WHEN 'J' THEN 'j' WHEN 'B' THEN 'b' ELSE e.format END,
           CASE WHEN e.format IN ('J', 'B') THEN substring(e.payload FROM position('\x0a'::bytea IN e.payload) + 1) ELSE e.payload END,
           (SELECT a.error FROM fastq.attempt_error a WHERE a.id = e.id ORDER BY a.failed_at DESC LIMIT 1)
      FROM ended e JOIN rules r ON r.lane = e.lane WHERE r.is_archived
), cut AS MATERIALIZED (
    SELECT least((SELECT min(lo) FROM sized WHERE before >= 2000), (SELECT min(lo) FROM weighed WHERE before >= 8388608)) AS lo
)
SELECT (SELECT count(*) FROM ended) AS tasks, coalesce((SELECT lo FROM cut) - 1, max(s.lo)) AS last_id,
       count(*) = $6 OR EXISTS (SELECT FROM cut WHERE lo IS NOT NULL) AS more,
       min(s.lo) FILTER (WHERE s.is_short AND NOT s.is_old AND s.lo < coalesce((SELECT lo FROM cut), 9223372036854775807)) AS first_kept
  FROM sized s
