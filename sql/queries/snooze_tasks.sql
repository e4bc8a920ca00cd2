-- Put tasks off that asked for it: no attempt is charged and no error kept, however often they ask.
-- $1 consumer; one element a task: $2 claim, $3 id, $4 delay in seconds. Answers the ids that their claims no longer hold.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::bigint[], $4::double precision[]) AS s (no, id, delay)
), held AS MATERIALIZED (
    SELECT no, lane, leaf, attempts, max_attempts, task_bytes, ids FROM fastq.claim
     WHERE consumer = $1::bigint AND no = ANY ($2) ORDER BY no FOR NO KEY UPDATE
), ended AS MATERIALIZED (
    SELECT s.*, h.lane, h.leaf, h.attempts, h.max_attempts, h.task_bytes FROM sent s JOIN held h USING (no) WHERE h.ids @> s.id
), moved AS MATERIALIZED (
    SELECT h.no, h.ids - e.ids AS rest
      FROM held h JOIN (SELECT no, range_agg(int8range(id, id, '[]')) AS ids FROM ended GROUP BY no) e USING (no)
), emptied AS (
    DELETE FROM fastq.claim WHERE consumer = $1 AND no = ANY (ARRAY (SELECT no FROM moved WHERE isempty(rest)))
), shrunk AS (
    UPDATE fastq.claim c SET ids = (SELECT m.rest FROM moved m WHERE m.no = c.no)
     WHERE c.consumer = $1 AND c.no = ANY (ARRAY (SELECT no FROM moved WHERE NOT isempty(rest)))
), snoozed AS (
    INSERT INTO fastq.delayed (id, run_at, lane, leaf, attempts, max_attempts, task_bytes, kind)
    SELECT id, clock_timestamp() + delay * interval '1 second', lane, leaf, attempts, max_attempts, task_bytes, 'scheduled' FROM ended
)
SELECT s.no, s.id FROM sent s WHERE NOT EXISTS (SELECT FROM ended e WHERE e.no = s.no AND e.id = s.id)
