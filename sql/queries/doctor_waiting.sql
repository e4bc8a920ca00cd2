-- Types and queues with due tasks that no consumer alive within $1 seconds takes; counts at most $2 chunks of each lane.
SELECT l.type, l.queue, sum(w.tasks)::bigint AS tasks, bool_or(w.chunks = $2::bigint) AS is_more
  FROM fastq.lane l,
       LATERAL (SELECT sum(r.hi - r.lo + 1) AS tasks, count(*) AS chunks
                  FROM (SELECT lo, hi FROM fastq.ready WHERE ready.lane = l.id LIMIT $2) r
                UNION ALL
                SELECT count(*), count(*)
                  FROM (SELECT lane FROM fastq.delayed WHERE run_at < statement_timestamp() - $1::double precision * interval '1 second'
                         ORDER BY run_at LIMIT $2) d WHERE d.lane = l.id) w
 WHERE NOT EXISTS (SELECT FROM fastq.consumer k
                    WHERE k.dead_at IS NULL AND NOT k.stopping AND k.beat_at > clock_timestamp() - $1 * interval '1 second'
                      AND (l.type = ANY (k.types)
                           OR EXISTS (SELECT FROM unnest(k.types) t WHERE t LIKE '%*' AND starts_with(l.type, left(t, -1))))
                      AND (k.queues IS NULL OR l.queue = ANY (k.queues)))
   AND w.tasks > 0
 GROUP BY l.type, l.queue ORDER BY l.type, l.queue
