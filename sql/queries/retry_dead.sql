-- Those of tasks $1 that ended in one of the states $2 are pending again and due now, with one more attempt where none is left. Answers
-- their ids. They wait with the payload that they carry, for the leader to write into a leaf: the one that they were in may have been
-- emptied, or be emptied now (it is asked about what names it, and nothing did). A copy that is left there goes: if that leaf is the open
-- one still, a second could not be written, and the promotion would fail. The time at which they would have expired, if over, no longer counts.
WITH locked AS MATERIALIZED (
    SELECT id FROM fastq.dead WHERE id = ANY ($1::bigint[]) AND state = ANY ($2::text[]) ORDER BY id FOR UPDATE
), gone AS MATERIALIZED (
    DELETE FROM fastq.dead WHERE id = ANY (ARRAY (SELECT id FROM locked)) RETURNING *
), copies AS (
    DELETE FROM fastq.task WHERE id = ANY (ARRAY (SELECT id FROM gone))
), back AS (
    INSERT INTO fastq.delayed (id, run_at, created_at, lane, attempts, max_attempts, task_bytes, kind, format, payload, expires_at)
    SELECT id, clock_timestamp(), created_at, lane, least(attempts, 32766), greatest(max_attempts, least(attempts + 1, 32767)), octet_length(payload),
           'retrying', format, payload, CASE WHEN expires_at > clock_timestamp() THEN expires_at END
      FROM gone
)
SELECT id FROM gone
