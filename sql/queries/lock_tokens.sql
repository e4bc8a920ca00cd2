-- The tokens of tasks $1, before the tasks themselves (lock order: claim, token, delayed, ready) and in the order in which loads take them.
SELECT FROM fastq.token WHERE id = ANY ($1::bigint[]) ORDER BY type, token FOR UPDATE
