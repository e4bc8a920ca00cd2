-- Tasks that were claimed and not started in time have expired. $1 consumer; one element a task: $2 claim, $3 id. Answers the ids that
-- their claims no longer hold. Claims are looked up as in complete_tasks.sql.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::bigint[]) AS s (no, id)
), held AS MATERIALIZED (
    SELECT h.* FROM (SELECT DISTINCT no FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no, lane, leaf, attempts, max_attempts, ids FROM fastq.claim c
                     WHERE c.consumer = $1::bigint AND c.no = s.no FOR NO KEY UPDATE) h
), ended AS MATERIALIZED (
    SELECT s.*, h.lane, h.leaf, h.attempts, h.max_attempts FROM sent s JOIN held h USING (no) WHERE h.ids @> s.id
), moved AS MATERIALIZED (
    SELECT h.consumer, h.no, h.ids - e.ids AS rest, CASE WHEN isempty(h.ids - e.ids) THEN 'none' ELSE 'some' END AS stays
      FROM held h JOIN (SELECT no, range_agg(int8range(id, id, '[]')) AS ids FROM ended GROUP BY no) e USING (no)
), emptied AS (
    DELETE FROM fastq.claim c USING moved m WHERE m.stays = 'none' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), shrunk AS (
    UPDATE fastq.claim c SET ids = m.rest FROM moved m WHERE m.stays = 'some' AND c.consumer = ANY (ARRAY[m.consumer]) AND c.no = m.no
), expired AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT e.id, coalesce(t.created_at, clock_timestamp()), e.lane, e.attempts, e.max_attempts, 'expired', coalesce(t.format, 'b'), coalesce(t.payload, ''), t.expires_at
      FROM ended e LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                                       WHERE task.leaf = e.leaf AND task.id = e.id OFFSET 0) t ON true
)
SELECT s.no, s.id FROM sent s WHERE NOT EXISTS (SELECT FROM ended e WHERE e.no = s.no AND e.id = s.id)
