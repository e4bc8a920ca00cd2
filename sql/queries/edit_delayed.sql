-- Change those of tasks $1 that wait for a time and whose kind is in $2: payload $4 in format $3, time $6, else $5 seconds from now, and
-- priority $7 (NULL: as it is; else its lane is there). Answers their ids. Content in a leaf is changed there: under the row's lock nobody makes the task ready, so no claim can
-- have seen it. The row is looked at as the lock found it: a leader may have put the content into it meanwhile.
WITH locked AS MATERIALIZED (
    SELECT id, leaf FROM fastq.delayed WHERE id = ANY ($1::bigint[]) AND kind = ANY ($2::text[]) ORDER BY id FOR UPDATE
), content AS (
    UPDATE fastq.task SET format = $3::"char", payload = $4
     WHERE id = ANY (ARRAY (SELECT id FROM locked)) AND leaf = ANY (ARRAY (SELECT leaf FROM locked)) AND $4::bytea IS NOT NULL
)
UPDATE fastq.delayed
   SET run_at = coalesce($6::timestamptz, clock_timestamp() + $5::double precision * interval '1 second', run_at),
       kind = CASE WHEN $5 IS NULL AND $6 IS NULL THEN kind ELSE 'scheduled' END,
       format = CASE WHEN leaf IS NULL THEN coalesce($3, format) END,
       payload = CASE WHEN leaf IS NULL THEN coalesce($4, payload) END,
       lane = coalesce((SELECT n.id FROM fastq.lane o JOIN fastq.lane n ON n.queue = o.queue AND n.type = o.type
                         WHERE o.id = delayed.lane AND n.priority = $7::smallint), lane),
       task_bytes = coalesce(octet_length($4), task_bytes)
 WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING id
