-- Those of tasks $1 that ended in one of the states $2 count as cancelled; when they ended stays as it is. Answers their ids.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.dead WHERE id = ANY ($1::bigint[]) AND state = ANY ($2::text[]) ORDER BY id FOR UPDATE
)
UPDATE fastq.dead SET state = 'cancelled' WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING id
