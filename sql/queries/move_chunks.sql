-- Waiting tasks of closed leaf $3 move to the open one, at most $4 chunks at a time; only the leader ($1, term $2). Answers how many moved.
-- A chunk is deleted and born again (same rid, so it keeps its place) together with the copy of its tasks: changed in place, a claim
-- with an older snapshot got ids without content.
WITH target AS MATERIALIZED (
    SELECT o.no FROM fastq.leaf o, fastq.leaf c WHERE o.state = 'open' AND c.no = $3::smallint AND c.state = 'closed' LIMIT 1
), picked AS MATERIALIZED (
    SELECT hi FROM fastq.ready
     WHERE leaf = $3 AND EXISTS (SELECT FROM target) AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     LIMIT $4::bigint FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT hi FROM picked)) RETURNING *
), content AS (
    INSERT INTO fastq.task (id, created_at, lane, leaf, max_attempts, format, payload, expires_at)
    SELECT t.id, t.created_at, t.lane, (SELECT no FROM target), t.max_attempts, t.format, t.payload, t.expires_at
      FROM gone g, LATERAL (SELECT id, created_at, lane, max_attempts, format, payload, expires_at FROM fastq.task
                             WHERE task.leaf = g.leaf AND id BETWEEN g.lo AND g.hi ORDER BY id OFFSET 0) t
), born AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT rid, lo, hi, lane, track, (SELECT no FROM target), attempts, max_attempts, task_bytes, expires_at FROM gone
)
SELECT count(*) AS chunks, coalesce(sum(hi - lo + 1), 0)::bigint AS tasks FROM gone
