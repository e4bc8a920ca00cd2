-- Change those of tasks $1 that wait for a time and whose kind is in $2: payload $4 in format $3, time $6, else $5 seconds from now, and
-- priority $7 (NULL: as it is; else its lane is there). Answers their ids. Content in a leaf is changed there: under the row's lock nobody makes the task ready, so no claim can
-- have seen it. The row is looked at as the lock found it: a leader may have put the content into it meanwhile. A line of
-- run options before the content (formats J and B) stays.
WITH locked AS MATERIALIZED (
    SELECT id, leaf FROM fastq.delayed WHERE id = ANY ($1::bigint[]) AND kind = ANY ($2::text[]) ORDER BY id FOR UPDATE
), content AS (
    UPDATE fastq.task
       SET format = CASE WHEN format IN ('J', 'B') AND position('\x0a'::bytea IN payload) > 0 THEN upper($3::"char"::text)::"char" ELSE $3 END,
           payload = CASE WHEN format IN ('J', 'B') THEN substring(payload FROM 1 FOR position('\x0a'::bytea IN payload)) || $4 ELSE $4 END
     WHERE id = ANY (ARRAY (SELECT id FROM locked)) AND leaf = ANY (ARRAY (SELECT leaf FROM locked)) AND $4::bytea IS NOT NULL
)
UPDATE fastq.delayed
   SET run_at = coalesce($6::timestamptz, clock_timestamp() + $5::double precision * interval '1 second', run_at),
       kind = CASE WHEN $5 IS NULL AND $6 IS NULL THEN kind ELSE 'scheduled' END,
       format = CASE WHEN leaf IS NOT NULL THEN NULL
                     WHEN format IN ('J', 'B') AND position('\x0a'::bytea IN payload) > 0 THEN coalesce(upper($3::text)::"char", format)
                     ELSE coalesce($3, format) END,
       payload = CASE WHEN leaf IS NOT NULL THEN NULL
                      WHEN format IN ('J', 'B') THEN coalesce(substring(payload FROM 1 FOR position('\x0a'::bytea IN payload)) || $4, payload)
                      ELSE coalesce($4, payload) END,
       lane = coalesce((SELECT n.id FROM fastq.lane o JOIN fastq.lane n ON n.queue = o.queue AND n.type = o.type
                         WHERE o.id = delayed.lane AND n.priority = $7::smallint), lane),
       task_bytes = coalesce(octet_length($4), task_bytes)
 WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING id
