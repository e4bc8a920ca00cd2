-- Put the tasks of dead or unknown consumers back at the front of their lanes, $3 claims at a time; only the leader ($1, term $2).
-- $4: these tasks alone, or NULL: all but those in $5.
-- Charged: the ids that the last beat named as running, under a claim that it knew; on tracks 3 and 4 (claimed to run at once and alone) all of them.
-- Each loss makes the next run more careful (track 2, then 3; 3 at once where one attempt is left), unless the consumer had been told to
-- stop. A task that was lost on track 2 and not named may have run or not: it is not charged, and runs alone with that debt (track 4);
-- lost again there, it pays both, since nothing else was to blame. Out of attempts is failed.
-- Pieces of at most 500 tasks, like any chunk: a longer one would keep others from what its claimer leaves.
WITH lost AS MATERIALIZED (
    SELECT c.consumer, c.no, c.lane, c.track, c.leaf, c.attempts, c.max_attempts, c.task_bytes, c.expires_at, c.ids - w.ids AS rest, w.ids,
           coalesce(k.stopping, false) AS stopping, k.host, k.pid, CASE WHEN c.no <= coalesce(k.last_no, c.no) THEN w.ids * coalesce(k.running, '{}') ELSE '{}' END AS ran
      FROM fastq.claim c LEFT JOIN fastq.consumer k ON k.id = c.consumer,
           LATERAL (SELECT CASE WHEN $4::int8multirange IS NULL THEN c.ids - $5::int8multirange ELSE c.ids * $4 END AS ids) w
     WHERE (k.id IS NULL OR k.dead_at IS NOT NULL) AND NOT isempty(w.ids)
       AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY c.consumer, c.no LIMIT $3::bigint FOR UPDATE OF c SKIP LOCKED
), freed AS (
    DELETE FROM fastq.claim c USING lost l WHERE c.consumer = l.consumer AND c.no = l.no AND isempty(l.rest)
), shrunk AS (
    UPDATE fastq.claim c SET ids = l.rest FROM lost l WHERE c.consumer = l.consumer AND c.no = l.no AND NOT isempty(l.rest)
), pieces AS MATERIALIZED (
    SELECT consumer, no, lane, track, leaf, max_attempts, task_bytes, expires_at, stopping, host, pid, p.ids, p.runs, l.attempts AS before,
           least(l.attempts + p.runs, max_attempts)::smallint AS attempts
      FROM lost l, LATERAL (VALUES (ids - ran, greatest(track - 2, 0)), (ran, greatest(track - 2, 1))) AS p (ids, runs)
     WHERE NOT isempty(p.ids)
), back AS (
    INSERT INTO fastq.ready (lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, lo, hi)
    SELECT lane, CASE WHEN stopping THEN least(greatest(track, 1), 3)
                      WHEN track = 2 AND runs = 0 THEN 4
                      WHEN track >= 2 OR max_attempts - attempts <= 1 THEN 3
                      ELSE 2 END,
           leaf, attempts, max_attempts, task_bytes, expires_at, lo, least(lo + 499, upper(r) - 1)
      FROM pieces, unnest(ids) r, generate_series(lower(r), upper(r) - 1, 500) lo WHERE attempts < max_attempts
), noted AS (
    INSERT INTO fastq.attempt_error (id, consumer, no, attempt, error)
    SELECT i, consumer, no, n,
           format(CASE WHEN n < attempts THEN 'the worker was lost, and the task may have run then: charged now that it was lost again, alone (process %s on %s)'
                       ELSE 'the worker was lost while the task ran (process %s on %s)' END,
                  coalesce(pid::text, 'unknown'), coalesce(host, 'an unknown host'))
      FROM pieces, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i, generate_series(before + 1, attempts) n
), failed AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT i, coalesce(t.created_at, clock_timestamp()), p.lane, p.attempts, p.max_attempts, 'failed', coalesce(t.format, 'b'), coalesce(t.payload, ''), t.expires_at
      FROM pieces p, unnest(p.ids) r, generate_series(lower(r), upper(r) - 1) i
           LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task WHERE task.leaf = p.leaf AND task.id = i OFFSET 0) t ON true
     WHERE p.attempts >= p.max_attempts
)
SELECT consumer, host, pid, count(DISTINCT no) AS claims,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)), 0)::bigint AS tasks,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)) FILTER (WHERE runs > 0), 0)::bigint AS charged,
       coalesce(sum((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r)) FILTER (WHERE attempts >= max_attempts), 0)::bigint AS failed,
       bool_or(stopping) AS stopping
  FROM pieces GROUP BY consumer, host, pid
