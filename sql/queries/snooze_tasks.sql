-- Put tasks off that asked for it: no attempt is charged and no error kept, however often they ask.
-- $1 consumer; one element a task: $2 claim, $3 id, $4 delay in seconds. Answers the ids that their claims no longer hold.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::bigint[], $4::double precision[]) AS s (no, id, delay)
), held AS MATERIALIZED (
    SELECT h.* FROM (SELECT DISTINCT no FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no, lane, leaf, attempts, max_attempts, task_bytes, expires_at, ids FROM fastq.claim c
                     WHERE c.consumer = $1::bigint AND c.no = s.no FOR NO KEY UPDATE) h
), ended AS MATERIALIZED (
    SELECT s.*, h.lane, h.leaf, h.attempts, h.max_attempts, h.task_bytes, h.expires_at FROM sent s JOIN held h USING (no) WHERE h.ids @> s.id
), moved AS MATERIALIZED (
    SELECT h.consumer, h.no, h.ids - e.ids AS rest, CASE WHEN isempty(h.ids - e.ids) THEN 'none' ELSE 'some' END AS stays
      FROM held h JOIN (SELECT no, range_agg(int8range(id, id, '[]')) AS ids FROM ended GROUP BY no) e USING (no)
), emptied AS (
    DELETE FROM fastq.claim c USING moved m WHERE m.stays = 'none' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), shrunk AS (
    UPDATE fastq.claim c SET ids = m.rest FROM moved m WHERE m.stays = 'some' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), snoozed AS (
    INSERT INTO fastq.delayed (id, run_at, lane, leaf, attempts, max_attempts, task_bytes, kind, expires_at)
    SELECT id, clock_timestamp() + delay * interval '1 second', lane, leaf, attempts, max_attempts, task_bytes, 'scheduled',
           CASE WHEN expires_at IS NOT NULL THEN (SELECT t.expires_at FROM fastq.task t WHERE t.leaf = ended.leaf AND t.id = ended.id) END
      FROM ended
)
SELECT s.no, s.id FROM sent s WHERE NOT EXISTS (SELECT FROM ended e WHERE e.no = s.no AND e.id = s.id)
