-- Record as completed what the claims ($2) of consumer $1 still hold of the ids sent ($3); answer what they no longer hold.
-- $4, $5, $6: the same ids in pieces that span less than 1,024, with the run time of each piece in microseconds.
-- Locks first and decides on the locked row: two flushes of one claim decided on a snapshot, and the second was lost.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::int8multirange[]) AS s (no, ids)
), held AS MATERIALIZED (
    SELECT no, lane, track, leaf, attempts, max_attempts, task_bytes, ids FROM fastq.claim
     WHERE consumer = $1::bigint AND no = ANY ($2) ORDER BY no FOR NO KEY UPDATE
), moved AS MATERIALIZED (
    SELECT h.*, h.ids * s.ids AS ok, h.ids - s.ids AS rest FROM held h JOIN sent s USING (no)
), emptied AS (
    DELETE FROM fastq.claim WHERE consumer = $1 AND no = ANY (ARRAY (SELECT no FROM moved WHERE isempty(rest)))
), shrunk AS (
    UPDATE fastq.claim c SET ids = (SELECT m.rest FROM moved m WHERE m.no = c.no)
     WHERE c.consumer = $1 AND c.no = ANY (ARRAY (SELECT no FROM moved WHERE NOT isempty(rest) AND NOT isempty(ok)))
), kept AS (
    INSERT INTO fastq.done (lane, leaf, lo, ids, consumer, no, attempts, took_us)
    SELECT m.lane, m.leaf, lower(p.ok), p.ok, $1, m.no, m.attempts + 1, d.took_us
      FROM unnest($4::bigint[], $5::int8multirange[], $6::bigint[]) AS d (no, ids, took_us)
      JOIN moved m USING (no), LATERAL (SELECT m.ok * d.ids AS ok) p
     WHERE NOT isempty(p.ok)
)
SELECT s.no, s.ids - coalesce(m.ok, '{}') AS refused FROM sent s LEFT JOIN moved m USING (no)
 WHERE NOT isempty(s.ids - coalesce(m.ok, '{}'))
