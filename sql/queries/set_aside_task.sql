-- Put off by a minute the task that a claim of one would take first of these lanes ($1), tracks ($2) and hints ($3): not even alone could
-- it be claimed, and it would keep all others from being. Answers its id.
WITH first AS MATERIALIZED (
    SELECT r.*
      FROM unnest($1::integer[], $2::smallint[], $3::bigint[]) WITH ORDINALITY AS a (lane, track, hint, ord),
           LATERAL (SELECT q.lo, q.hi, q.lane, q.leaf, q.attempts, q.max_attempts, q.task_bytes, q.expires_at
                      FROM fastq.ready q
                     WHERE q.lane = a.lane AND q.track = a.track AND q.rid >= a.hint
                     ORDER BY q.rid LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
     LIMIT 1
), whole AS (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT hi FROM first WHERE lo = hi)) RETURNING hi
), part AS (
    UPDATE fastq.ready SET lo = lo + 1 WHERE hi = ANY (ARRAY (SELECT hi FROM first WHERE lo < hi)) RETURNING hi
), taken AS MATERIALIZED (
    SELECT * FROM first WHERE hi IN (SELECT hi FROM whole UNION ALL SELECT hi FROM part)
)
INSERT INTO fastq.delayed (id, run_at, lane, leaf, attempts, max_attempts, task_bytes, kind, expires_at)
SELECT k.lo, clock_timestamp() + interval '1 minute', k.lane, k.leaf, k.attempts, k.max_attempts, k.task_bytes, 'scheduled', t.expires_at
  FROM taken k LEFT JOIN LATERAL (SELECT expires_at FROM fastq.task
                                   WHERE k.expires_at IS NOT NULL AND task.leaf = k.leaf AND task.id = k.lo OFFSET 0) t ON true
RETURNING id
