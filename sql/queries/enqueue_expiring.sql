-- enqueue_tasks.sql, with all its parameters, where some of the tasks expire. $14 and $15: when each task, and the first of each chunk,
-- does. A statement of its own, since two columns that are mostly empty cost every task 0.6 us of the server's.
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
