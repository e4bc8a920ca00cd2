-- Every waiting task gets a chunk of its own, as if it had been enqueued alone.
WITH gone AS (DELETE FROM fastq.ready RETURNING *)
INSERT INTO fastq.ready (lo, hi, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at)
SELECT i, i, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at FROM gone, generate_series(lo, hi) i ORDER BY i
