-- claim_tasks.sql for a claim of one task, which most of its plan is not needed for: it costs half as much. $1 is the consumer, $2 the
-- claim's number; the first chunk of the lanes asked for, in their order, loses its first task. Content is read in leaf $6 alone, where the
-- last claim found it: to prepare a look into all sixteen costs as much as the rest. If it lies elsewhere, read_tasks.sql brings it.
WITH locked AS MATERIALIZED (
    SELECT r.*
      FROM unnest($3::integer[], $4::smallint[], $5::bigint[]) WITH ORDINALITY AS a (lane, track, hint, ord),
           LATERAL (SELECT q.rid, q.lo, q.hi, q.lane, q.track, q.leaf, q.attempts, q.max_attempts, q.task_bytes, q.expires_at
                      FROM fastq.ready q
                     WHERE q.lane = a.lane AND q.track = a.track AND q.rid >= a.hint
                     ORDER BY q.rid LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
     LIMIT 1
), whole AS (
    DELETE FROM fastq.ready WHERE hi = (SELECT hi FROM locked WHERE lo = hi) RETURNING hi
), part AS (
    UPDATE fastq.ready r SET lo = (SELECT k.lo + 1 FROM locked k) WHERE r.hi = (SELECT hi FROM locked WHERE lo < hi) RETURNING r.hi
), taken AS MATERIALIZED (
    SELECT * FROM locked WHERE hi = coalesce((SELECT hi FROM whole), (SELECT hi FROM part))
), stored AS (
    INSERT INTO fastq.claim (consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, ids)
    SELECT $1::bigint, $2::bigint, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, int8multirange(int8range(lo, lo, '[]')) FROM taken
)
SELECT $2 AS no, k.lane, k.track, k.rid, k.leaf, k.attempts, k.max_attempts, k.lo, k.lo AS upto, k.lo < k.hi AS shrunk,
       CASE WHEN t.id IS NOT NULL THEN ARRAY[t.id] END AS ids, ARRAY[t.created_at] AS created_ats, ARRAY[t.format] AS formats, ARRAY[t.payload] AS payloads,
       k.expires_at IS NOT NULL AS expires
  FROM taken k LEFT JOIN LATERAL (SELECT id, created_at, format, payload FROM fastq.task
                                   WHERE task.leaf = $6::smallint AND task.id = k.lo AND k.leaf = $6 OFFSET 0) t ON true
