-- complete_tasks.sql for one task ($3) that is all that claim $2 of consumer $1 holds, at half its cost; $4: run time in microseconds. The row
-- is deleted only if it holds that task and no other, also where somebody was changing it. Where none is, complete_tasks.sql finds out why.
WITH gone AS (
    DELETE FROM fastq.claim
     WHERE consumer = $1::bigint AND no = $2::bigint AND ids = int8multirange(int8range($3::bigint, $3, '[]')) RETURNING lane, leaf, attempts
)
INSERT INTO fastq.done (lane, leaf, lo, ids, consumer, no, attempts, took_us)
SELECT lane, leaf, $3, int8multirange(int8range($3, $3, '[]')), $1, $2, attempts + 1, $4::bigint FROM gone
