-- Tasks for later, with their payload. One element a task: ids, lanes, max_attempts, formats, payloads, seconds from now or the time itself,
-- and when they expire (empty where none does).
INSERT INTO fastq.delayed (id, lane, max_attempts, format, payload, task_bytes, created_at, kind, run_at, expires_at)
SELECT id, lane, max_attempts, format, payload, octet_length(payload), statement_timestamp(), 'scheduled',
       coalesce(run_at, clock_timestamp() + delay * interval '1 second'), expires_at
  FROM unnest($1::bigint[], $2::integer[], $3::smallint[], $4::"char"[], $5::bytea[], $6::double precision[], $7::timestamptz[], $8::timestamptz[])
       AS d (id, lane, max_attempts, format, payload, delay, run_at, expires_at)
