-- Record as completed what the claims ($2) of consumer $1 still hold of the ids sent ($3); answer what they no longer hold.
-- $4, $5, $6: the same ids in pieces that span less than 1,024, with the run time of each piece in microseconds.
-- Locks first and decides on the locked row: two flushes of one claim decided on a snapshot, and the second was lost.
-- Claims are looked up one by one, by their whole key: where a list of numbers is sought, old servers prefer to read all of a consumer's
-- claims, dead ones too, and beside a held snapshot there are more of them every second (PostgreSQL 15: a third of the rate in a minute).
-- So `stays` is a word, which the planner thinks rare, and the consumer stands in an array, which no other way to look it up takes.
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
)
SELECT s.no, s.ids - coalesce(m.ok, '{}') AS refused FROM sent s LEFT JOIN moved m USING (no)
 WHERE NOT isempty(s.ids - coalesce(m.ok, '{}'))
