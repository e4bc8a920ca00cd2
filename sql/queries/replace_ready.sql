-- Change those of the tasks that wait in chunks, as edit_ready.sql does, each in its own way: what a later task of the same token brings.
-- Parameters and answer as in replace_delayed.sql, which comes first: a promotion in flight is waited for there and found here.
WITH wanted AS MATERIALIZED (
    SELECT id, format, payload,
           coalesce('epoch'::timestamptz + us / 3600000000 * interval '1 hour' + us % 3600000000 * interval '1 microsecond',
                    clock_timestamp() + delay * interval '1 second') AS run_at
      FROM unnest($1::refcursor::text::bigint[], $2::refcursor::text::"char"[], $3::refcursor::text::bytea[], $4::refcursor::text::double precision[], $5::refcursor::text::bigint[])
           AS t (id, format, payload, delay, us)
), placed AS MATERIALIZED (
    SELECT w.id, c.hi FROM wanted w, LATERAL (SELECT lo, hi FROM fastq.ready WHERE hi >= w.id ORDER BY hi LIMIT 1) c WHERE c.lo <= w.id
), sent AS MATERIALIZED (
    SELECT hi, range_agg(int8range(id, id, '[]')) AS ids FROM placed GROUP BY hi
), locked AS MATERIALIZED (
    SELECT lo, hi FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT hi FROM sent)) ORDER BY hi FOR UPDATE
), gone AS MATERIALIZED (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT l.hi FROM locked l JOIN sent s USING (hi) WHERE s.ids && int8range(l.lo, l.hi, '[]'))) RETURNING *
), pieces AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT rid, lower(r), upper(r) - 1, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at
      FROM gone g JOIN sent s USING (hi), unnest(int8multirange(int8range(g.lo, g.hi, '[]')) - s.ids) r
), taken AS MATERIALIZED (
    SELECT w.id, w.run_at, w.format, w.payload, coalesce(w.run_at > clock_timestamp(), false) AS waits, g.rid, g.lane, g.track, g.leaf, g.attempts,
           g.max_attempts, coalesce(octet_length(w.payload), g.task_bytes) AS task_bytes,
           CASE WHEN g.expires_at IS NOT NULL THEN (SELECT t.expires_at FROM fastq.task t WHERE t.leaf = g.leaf AND t.id = w.id) END AS expires_at
      FROM gone g JOIN placed p USING (hi) JOIN wanted w USING (id) WHERE w.id >= g.lo
), content AS (
    UPDATE fastq.task t SET format = k.format, payload = k.payload
      FROM taken k
     WHERE t.id = k.id AND t.leaf = k.leaf AND k.payload IS NOT NULL
       AND t.id = ANY (ARRAY (SELECT id FROM taken)) AND t.leaf = ANY (ARRAY (SELECT leaf FROM taken))
), ready AS (
    INSERT INTO fastq.ready (rid, lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
    SELECT rid, id, id, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at FROM taken WHERE NOT waits
), later AS (
    INSERT INTO fastq.delayed (id, run_at, lane, leaf, attempts, max_attempts, task_bytes, kind, expires_at)
    SELECT id, run_at, lane, leaf, attempts, max_attempts, task_bytes, 'scheduled', expires_at FROM taken WHERE waits
)
SELECT coalesce(array_agg(id), '{}')::text::refcursor FROM taken
