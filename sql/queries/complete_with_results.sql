-- As complete_tasks.sql, with what the handlers returned: $7 ids, $8 their claims, $9 seconds to keep it, $10 formats, $11 values. A result
-- is stored only for a task that its claim still holds, in the statement that records it as completed.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::int8multirange[]) AS s (no, ids)
), held AS MATERIALIZED (
    SELECT h.* FROM (SELECT DISTINCT no FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, ids FROM fastq.claim c
                     WHERE c.consumer = $1::bigint AND c.no = s.no FOR NO KEY UPDATE) h
), moved AS MATERIALIZED (
    SELECT h.*, h.ids * s.ids AS ok, h.ids - s.ids AS rest,
           CASE WHEN isempty(h.ids - s.ids) THEN 'none' WHEN isempty(h.ids * s.ids) THEN 'all' ELSE 'some' END AS stays
      FROM held h JOIN sent s USING (no)
), emptied AS (
    DELETE FROM fastq.claim c USING moved m WHERE m.stays = 'none' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), shrunk AS (
    UPDATE fastq.claim c SET ids = m.rest FROM moved m WHERE m.stays = 'some' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), kept AS (
    INSERT INTO fastq.done (lane, leaf, lo, ids, consumer, no, attempts, took_us)
    SELECT m.lane, m.leaf, lower(p.ok), p.ok, $1, m.no, m.attempts + 1, d.took_us
      FROM unnest($4::bigint[], $5::int8multirange[], $6::bigint[]) AS d (no, ids, took_us)
      JOIN moved m USING (no), LATERAL (SELECT m.ok * d.ids AS ok) p
     WHERE NOT isempty(p.ok)
), results AS (
    INSERT INTO fastq.result (id, expires_at, format, value)
    SELECT r.id, clock_timestamp() + r.seconds * interval '1 second', r.format::"char", r.value
      FROM unnest($7::bigint[], $8::bigint[], $9::double precision[], $10::text[], $11::bytea[]) AS r (id, no, seconds, format, value)
      JOIN moved m USING (no)
     WHERE m.ok @> r.id
)
SELECT s.no, s.ids - coalesce(m.ok, '{}') AS refused FROM sent s LEFT JOIN moved m USING (no)
 WHERE NOT isempty(s.ids - coalesce(m.ok, '{}'))
