-- Every completed task gets a row of its own, as if each had been completed alone.
WITH gone AS (DELETE FROM fastq.done RETURNING *)
INSERT INTO fastq.done (lo, consumer, no, done_at, took_us, lane, leaf, attempts, ids)
SELECT i, consumer, no, done_at, 0, lane, leaf, attempts, int8multirange(int8range(i, i, '[]'))
  FROM gone, unnest(ids) r, generate_series(lower(r), upper(r) - 1) i ORDER BY i
