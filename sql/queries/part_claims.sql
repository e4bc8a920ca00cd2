-- Give tasks that consumer $1 runs claims of their own, element by element: $2 claims, $3 ids, $4 their own claims' numbers. A transaction of
-- somebody else's may then hold such a claim's lock for as long as it likes: no flush, give-back or rescue of the neighbours waits for it.
-- Answers the numbers of the claims that are there, those of an earlier try whose answer was lost among them, and which server and
-- database this is, as find_home.sql does. Asynchronous, like any claim: lost with a crash, the task is still held by the claim it was in.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::bigint[], $4::bigint[]) AS s (no, id, own)
     WHERE set_config('synchronous_commit', 'off', true) = 'off'
), held AS MATERIALIZED (
    SELECT h.* FROM (SELECT DISTINCT no FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, ids FROM fastq.claim c
                     WHERE c.consumer = $1::bigint AND c.no = s.no FOR NO KEY UPDATE) h
), parted AS MATERIALIZED (
    SELECT h.*, s.id, s.own FROM sent s JOIN held h USING (no) WHERE h.ids @> s.id
), moved AS MATERIALIZED (
    SELECT h.consumer, h.no, h.ids - p.ids AS rest, CASE WHEN isempty(h.ids - p.ids) THEN 'none' ELSE 'some' END AS stays
      FROM held h JOIN (SELECT no, range_agg(int8range(id, id, '[]')) AS ids FROM parted GROUP BY no) p USING (no)
), emptied AS (
    DELETE FROM fastq.claim c USING moved m WHERE m.stays = 'none' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), shrunk AS (
    UPDATE fastq.claim c SET ids = m.rest FROM moved m WHERE m.stays = 'some' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), kept AS (
    INSERT INTO fastq.claim (consumer, no, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, ids)
    SELECT consumer, own, claimed_at, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, int8multirange(int8range(id, id, '[]'))
      FROM parted
    RETURNING no
)
SELECT s.own, (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint AS started_at,
       (SELECT oid FROM pg_database WHERE datname = current_database())::bigint AS base
  FROM sent s
 WHERE s.own IN (SELECT no FROM kept)
    OR EXISTS (SELECT FROM fastq.claim c WHERE c.consumer = $1 AND c.no = s.own OFFSET 0)
