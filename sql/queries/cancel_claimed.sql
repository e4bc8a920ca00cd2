-- Cancel those of tasks $1 that are claimed: their claims no longer hold them, so what comes back from their runs is refused. Answers their
-- ids, and from which claim each was taken, so that its worker can be told. The run counts, begun or not: nobody here can tell, and no start may be without an attempt. Locks first and decides on the locked
-- row, in the order of completions: who comes first has ended the task.
WITH sent AS MATERIALIZED (
    SELECT range_agg(int8range(i, i, '[]')) AS ids FROM unnest($1::bigint[]) i
), held AS MATERIALIZED (
    SELECT consumer, no, lane, leaf, attempts, max_attempts, ids FROM fastq.claim
     WHERE ids && (SELECT ids FROM sent) ORDER BY consumer, no FOR NO KEY UPDATE
), moved AS MATERIALIZED (
    SELECT h.*, h.ids * s.ids AS ok, h.ids - s.ids AS rest FROM held h, sent s
), emptied AS (
    DELETE FROM fastq.claim c USING moved m WHERE c.consumer = m.consumer AND c.no = m.no AND isempty(m.rest)
), shrunk AS (
    UPDATE fastq.claim c SET ids = m.rest FROM moved m WHERE c.consumer = m.consumer AND c.no = m.no AND NOT isempty(m.rest)
), taken AS MATERIALIZED (
    SELECT i AS id, consumer, no, lane, leaf, attempts, max_attempts FROM moved, unnest(ok) r, generate_series(lower(r), upper(r) - 1) i
), kept AS (
    INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload, expires_at)
    SELECT k.id, coalesce(t.created_at, clock_timestamp()), k.lane, k.attempts + 1, k.max_attempts, 'cancelled', coalesce(t.format, 'b'), coalesce(t.payload, ''), t.expires_at
      FROM taken k LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.task
                                       WHERE task.leaf = k.leaf AND task.id = k.id OFFSET 0) t ON true
)
SELECT id, consumer, no FROM taken
