-- Take those of tasks $1 that wait in chunks out of them; forget_tasks.sql does the rest, in the same transaction. Answers their ids.
-- As in cancel_ready.sql, the row lock decides against a claim in flight, and what is left of a chunk is born again.
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
)
SELECT i AS id FROM gone g, sent s, unnest(int8multirange(int8range(g.lo, g.hi, '[]')) * s.ids) r, generate_series(lower(r), upper(r) - 1) i
