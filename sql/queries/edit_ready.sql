-- Change those of tasks $1 that wait in chunks: payload $3 in format $2, time $5, else $4 seconds from now, and priority $6
-- (NULL: as it is). Answers their ids. The chunk's row lock decides against a claim in flight. The content is changed where it lies, in the transaction in which the
-- chunk is deleted and its pieces are born, each edited task as one of its own, with the same rid: a claim with an older snapshot finds the
-- chunk deleted and takes nothing of it, one with a newer sees the new pieces and the new content. Nobody runs the old one afterwards. A line of run options before it (formats J and B) stays.
-- Another priority is another lane, which is there: the task comes last in it, with a rid of its own, since claimers remember how far they are.
-- With a time to come it waits in `delayed`, where its leaf is still named; it is no longer careful then (track), as after any retry.
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
), due AS MATERIALIZED (
    SELECT run_at, coalesce(run_at > clock_timestamp(), false) AS waits
      FROM (SELECT coalesce($5::timestamptz, clock_timestamp() + $4::double precision * interval '1 second') AS run_at) t
), taken AS MATERIALIZED (
    SELECT i AS id, CASE WHEN coalesce(m.id, g.lane) = g.lane THEN g.rid END AS rid, coalesce(m.id, g.lane) AS lane, g.track, g.leaf, g.attempts, g.max_attempts, coalesce(octet_length($3::bytea), g.task_bytes) AS task_bytes,
           CASE WHEN g.expires_at IS NOT NULL THEN (SELECT t.expires_at FROM fastq.task t WHERE t.leaf = g.leaf AND t.id = i) END AS expires_at
      FROM gone g LEFT JOIN LATERAL (SELECT n.id FROM fastq.lane o JOIN fastq.lane n ON n.queue = o.queue AND n.type = o.type
                                       WHERE o.id = g.lane AND n.priority = $6::smallint) m ON true,
           sent s, unnest(int8multirange(int8range(g.lo, g.hi, '[]')) * s.ids) r, generate_series(lower(r), upper(r) - 1) i
), content AS (
    UPDATE fastq.task
       SET format = CASE WHEN format IN ('J', 'B') AND position('\x0a'::bytea IN payload) > 0 THEN upper($2::"char"::text)::"char" ELSE $2 END,
           payload = CASE WHEN format IN ('J', 'B') THEN substring(payload FROM 1 FOR position('\x0a'::bytea IN payload)) || $3 ELSE $3 END
     WHERE id = ANY (ARRAY (SELECT id FROM taken)) AND leaf = ANY (ARRAY (SELECT leaf FROM taken)) AND $3 IS NOT NULL
), ready AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT coalesce(rid, nextval('fastq.rid')), id, id, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at FROM taken WHERE NOT (SELECT waits FROM due)
), later AS (
    INSERT INTO fastq.delayed (id, run_at, lane, leaf, attempts, max_attempts, task_bytes, kind, expires_at)
    SELECT id, (SELECT run_at FROM due), lane, leaf, attempts, max_attempts, task_bytes, 'scheduled', expires_at FROM taken WHERE (SELECT waits FROM due)
)
SELECT id FROM taken
