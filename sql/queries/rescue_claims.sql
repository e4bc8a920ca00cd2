-- Put the tasks of dead or unknown consumers back at the front of their lanes, $3 claims at a time; only the leader ($1, term $2).
-- Charged: on track 0 and 1 the ids that the last beat named as running, on track 2 and 3 (claimed is started) all of them.
-- Each loss makes the next run more careful (track 2, then 3; 3 at once where one attempt is left), unless the consumer had been told
-- to stop. Out of attempts is failed.
WITH lost AS MATERIALIZED (
    SELECT c.*, coalesce(k.stopping, false) AS stopping, k.host, k.pid, c.ids * coalesce(k.running, '{}') AS ran
      FROM fastq.claim c LEFT JOIN fastq.consumer k ON k.id = c.consumer
     WHERE (k.id IS NULL OR k.dead_at IS NOT NULL)
       AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY c.consumer, c.no LIMIT $3::bigint FOR UPDATE OF c SKIP LOCKED
), freed AS (
    DELETE FROM fastq.claim c USING lost l WHERE c.consumer = l.consumer AND c.no = l.no
), pieces AS MATERIALIZED (
    SELECT consumer, no, lane, track, leaf, max_attempts, task_bytes, stopping, host, pid, p.ids, p.charged,
           (attempts + CASE WHEN p.charged THEN 1 ELSE 0 END)::smallint AS attempts
      FROM lost, LATERAL (VALUES (ids - ran, track >= 2), (ran, true)) AS p (ids, charged)
     WHERE NOT isempty(p.ids)
), back AS (
    INSERT INTO fastq.ready (lane, track, leaf, attempts, max_attempts, task_bytes, lo, hi)
    SELECT lane, CASE WHEN stopping THEN greatest(track, 1) WHEN max_attempts - attempts <= 1 OR track >= 2 THEN 3 ELSE 2 END,
           leaf, attempts, max_attempts, task_bytes, lower(r), upper(r) - 1
      FROM pieces, unnest(ids) r WHERE attempts < max_attempts
), noted AS (
    INSERT INTO fastq.attempt_error (id, consumer, no, attempt, error)
    SELECT i, consumer, no, attempts, format('the worker was lost while the task ran (process %s on %s)', coalesce(pid::text, 'unknown'), coalesce(host, 'an unknown host'))
      FROM pieces, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i WHERE charged
), failed AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT i, coalesce(t.created_at, clock_timestamp()), p.lane, p.attempts, p.max_attempts, 'failed', coalesce(t.format, 'b'), coalesce(t.payload, ''), t.expires_at
      FROM pieces p, unnest(p.ids) r, generate_series(lower(r), upper(r) - 1) i
           LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task WHERE task.leaf = p.leaf AND task.id = i OFFSET 0) t ON true
     WHERE p.attempts >= p.max_attempts
)
SELECT consumer, host, pid, count(DISTINCT no) AS claims,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)), 0)::bigint AS tasks,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)) FILTER (WHERE charged), 0)::bigint AS charged,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)) FILTER (WHERE attempts >= max_attempts), 0)::bigint AS failed
  FROM pieces GROUP BY consumer, host, pid
