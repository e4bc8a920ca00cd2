-- How many tasks are in each state, by queue and type. Reads the narrow tables of the states, never the tasks.
WITH counted AS (
    SELECT lane, 'ready' AS state, sum(hi - lo + 1) AS tasks FROM fastq.ready GROUP BY lane
    UNION ALL
    SELECT lane, kind, count(*) FROM fastq.delayed GROUP BY lane, kind
    UNION ALL
    SELECT lane, 'running', sum(upper(r) - lower(r)) FROM fastq.claim, unnest(ids) r GROUP BY lane
    UNION ALL
    SELECT lane, 'completed', sum(upper(r) - lower(r)) FROM fastq.done, unnest(ids) r GROUP BY lane
    UNION ALL
    SELECT lane, state, count(*) FROM fastq.dead GROUP BY lane, state
)
SELECT l.queue, l.type, c.state, sum(c.tasks)::bigint AS tasks FROM counted c JOIN fastq.lane l ON l.id = c.lane GROUP BY l.queue, l.type, c.state
