-- Give back whole claims of consumer $1 that it holds without knowing ($2): the answer to the claim was lost on its way.
WITH gone AS (
    DELETE FROM fastq.claim WHERE consumer = $1::bigint AND no = ANY ($2::bigint[]) RETURNING *
)
INSERT INTO fastq.ready (lane, track, leaf, attempts, max_attempts, task_bytes, lo, hi)
SELECT g.lane, greatest(g.track, 1), g.leaf, g.attempts, g.max_attempts, g.task_bytes, lower(r), upper(r) - 1 FROM gone g, unnest(g.ids) r
