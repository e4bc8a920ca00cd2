-- Cancel those of tasks $1 that wait in chunks. Answers their ids. A chunk is deleted and what is left of it born again with the same rid,
-- so it keeps its place; changed in place, a claim with an older snapshot would take what it no longer holds. The chunk's row lock decides
-- against a claim in flight: the locked row is looked at as it is now, and what the claim took is in none of the pieces.
WITH sent AS MATERIALIZED (
    SELECT range_agg(int8range(i, i, '[]')) AS ids FROM unnest($1::bigint[]) i
), locked AS MATERIALIZED (
    SELECT lo, hi FROM fastq.ready
     WHERE hi = ANY (ARRAY (SELECT c.hi FROM unnest($1) i, LATERAL (SELECT lo, hi FROM fastq.ready WHERE hi >= i ORDER BY hi LIMIT 1) c WHERE c.lo <= i))
     ORDER BY hi FOR UPDATE
), gone AS MATERIALIZED (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT l.hi FROM locked l, sent s WHERE s.ids && int8range(l.lo, l.hi, '[]'))) RETURNING *
), pieces AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT rid, lower(r), upper(r) - 1, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at
      FROM gone g, sent s, unnest(int8multirange(int8range(g.lo, g.hi, '[]')) - s.ids) r
), taken AS MATERIALIZED (
    SELECT i AS id, g.lane, g.leaf, g.attempts, g.max_attempts
      FROM gone g, sent s, unnest(int8multirange(int8range(g.lo, g.hi, '[]')) * s.ids) r, generate_series(lower(r), upper(r) - 1) i
), kept AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT k.id, coalesce(t.created_at, clock_timestamp()), k.lane, k.attempts, k.max_attempts, 'cancelled', coalesce(t.format, 'b'), coalesce(t.payload, ''), t.expires_at
      FROM taken k LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                                       WHERE task.leaf = k.leaf AND task.id = k.id OFFSET 0) t ON true
)
SELECT id FROM taken
