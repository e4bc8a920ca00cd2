-- Take those of tasks $1 away that ended in one of the states $2; forget_tasks.sql does the rest, in the same transaction. Answers their ids.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.dead WHERE id = ANY ($1::bigint[]) AND state = ANY ($2::text[]) ORDER BY id FOR UPDATE
)
DELETE FROM fastq.dead WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING id
