-- Tasks and their chunks in one statement, for up to a few dozen tasks. $1 leaf; one element a task: $2 ids, $3 lanes,
-- $4 max_attempts, $5 formats, $6 payloads; one a chunk: $7 lanes, $8 max_attempts, $9 task_bytes, $10 lo, $11 hi.
-- $14 and $15: when each task, and the first of each chunk, expires; both empty where none does.
-- $12 channel and $13 lanes as text, or null: wake the consumers that listen with the commit itself. It then doesn't wait for the log,
-- since NOTIFY holds a lock of the whole server until it has: flush_log.sql must follow before anybody is told that the tasks are in.
WITH content AS (
    INSERT INTO fastq.task (id, lane, leaf, max_attempts, format, payload, expires_at)
    SELECT id, lane, $1::smallint, max_attempts, format, payload, expires_at
      FROM unnest($2::bigint[], $3::integer[], $4::smallint[], $5::"char"[], $6::bytea[], $14::timestamptz[])
           AS t (id, lane, max_attempts, format, payload, expires_at)
),
chunks AS (
    INSERT INTO fastq.ready (lane, leaf, max_attempts, task_bytes, lo, hi, expires_at)
    SELECT lane, $1, max_attempts, task_bytes, lo, hi, expires_at
      FROM unnest($7::integer[], $8::smallint[], $9::integer[], $10::bigint[], $11::bigint[], $15::timestamptz[])
           AS c (lane, max_attempts, task_bytes, lo, hi, expires_at)
)
SELECT pg_notify($12::text, $13::text)
 WHERE CASE WHEN $13 IS NOT NULL THEN set_config('synchronous_commit', 'off', true) = 'off' END
