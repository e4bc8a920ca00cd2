-- Tasks and their chunks in one statement, for up to a few dozen tasks, none of which expires. $1 leaf; one element a task: $2 ids, $3 lanes,
-- $4 max_attempts, $5 formats, $6 payloads; one a chunk: $7 lanes, $8 max_attempts, $9 task_bytes, $10 lo, $11 hi.
-- $12 channel and $13 lanes as text, or null: wake the consumers that listen with the commit itself. It then doesn't wait for the log,
-- since NOTIFY holds a lock of the whole server until it has: flush_log.sql must follow before anybody is told that the tasks are in.
WITH content AS (
    INSERT INTO fastq.task (id, lane, leaf, max_attempts, format, payload)
    SELECT id, lane, $1::smallint, max_attempts, format, payload
      FROM unnest($2::bigint[], $3::integer[], $4::smallint[], $5::"char"[], $6::bytea[]) AS t (id, lane, max_attempts, format, payload)
),
chunks AS (
    INSERT INTO fastq.ready (lane, leaf, max_attempts, task_bytes, lo, hi)
    SELECT lane, $1, max_attempts, task_bytes, lo, hi
      FROM unnest($7::integer[], $8::smallint[], $9::integer[], $10::bigint[], $11::bigint[]) AS c (lane, max_attempts, task_bytes, lo, hi)
)
SELECT pg_notify($12::text, $13::text)
 WHERE CASE WHEN $13 IS NOT NULL THEN set_config('synchronous_commit', 'off', true) = 'off' END
