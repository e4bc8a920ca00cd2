-- Take those of tasks $1 away that wait for a time and whose kind is in $2; forget_tasks.sql does the rest, in the same transaction. Answers
-- their ids.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.delayed WHERE id = ANY ($1::bigint[]) AND kind = ANY ($2::text[]) ORDER BY id FOR UPDATE
)
DELETE FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING id
