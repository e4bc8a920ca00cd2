-- Put tasks that were claimed but not started back at the front of their lanes, uncharged; answer what was no longer held.
-- $1 consumer, $2 claims, $3 ids of each. Pieces of at most 500 tasks, like any chunk: a longer one would keep others from what its
-- claimer leaves.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::int8multirange[]) AS s (no, ids)
), held AS MATERIALIZED (
    SELECT h.* FROM (SELECT DISTINCT no FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, ids FROM fastq.claim c
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
    INSERT INTO fastq.ready (lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, lo, hi)
    SELECT m.lane, greatest(m.track, 1), m.leaf, m.attempts, m.max_attempts, m.task_bytes, m.expires_at, lo, least(lo + 499, upper(r) - 1)
      FROM moved m, unnest(m.ok) r, generate_series(lower(r), upper(r) - 1, 500) lo
)
SELECT s.no, s.ids - coalesce(m.ok, '{}') AS refused FROM sent s LEFT JOIN moved m USING (no)
 WHERE NOT isempty(s.ids - coalesce(m.ok, '{}'))
