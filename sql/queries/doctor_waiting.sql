-- Types and queues with due tasks that no consumer alive within $1 seconds takes.
WITH waiting AS (
    SELECT lane, sum(hi - lo + 1)::bigint AS tasks FROM fastq.ready GROUP BY lane
    UNION ALL
    SELECT lane, count(*) FROM fastq.delayed WHERE run_at < clock_timestamp() - $1::double precision * interval '1 second' GROUP BY lane
)
SELECT l.type, l.queue, sum(w.tasks)::bigint AS tasks
  FROM waiting w JOIN fastq.lane l ON l.id = w.lane
 WHERE NOT EXISTS (SELECT FROM fastq.consumer k
                    WHERE k.dead_at IS NULL AND NOT k.stopping AND k.beat_at > clock_timestamp() - $1 * interval '1 second'
                      AND l.type = ANY (k.types) AND (k.queues IS NULL OR l.queue = ANY (k.queues)))
 GROUP BY l.type, l.queue ORDER BY l.type, l.queue
