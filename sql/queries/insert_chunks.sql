-- The chunks of tasks that were just copied into leaf $1; one element a chunk.
INSERT INTO fastq.ready (lane, leaf, max_attempts, task_bytes, lo, hi)
SELECT lane, $1::smallint, max_attempts, task_bytes, lo, hi
  FROM unnest($2::integer[], $3::smallint[], $4::integer[], $5::bigint[], $6::bigint[]) AS c (lane, max_attempts, task_bytes, lo, hi)
