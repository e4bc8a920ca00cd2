-- After tasks $1 were taken from wherever they were, in the same transaction: their contents, failed attempts, results and tokens go, too.
-- Any leaf may hold a copy. The tokens were locked by lock_tokens.sql.
WITH content AS (
    DELETE FROM fastq.task WHERE id = ANY ($1::bigint[])
), errors AS (
    DELETE FROM fastq.attempt_error WHERE id = ANY ($1)
), results AS (
    DELETE FROM fastq.result WHERE id = ANY ($1)
)
DELETE FROM fastq.token WHERE id = ANY ($1)
