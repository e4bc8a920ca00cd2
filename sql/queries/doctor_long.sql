-- Tasks that living consumers have run for longer than $1 seconds and $2 times what their type usually takes, by the last $3 flushes of
-- what is newest: a look at one index's end, not at all that completed.
WITH usual AS (
    SELECT lane, sum(took_us) / 1e6 / sum(tasks) AS seconds
      FROM (SELECT lane, took_us, (SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r) AS tasks FROM fastq.done
             WHERE leaf = (SELECT no FROM fastq.leaf WHERE state = 'open' LIMIT 1) ORDER BY lo DESC LIMIT $3::bigint) d
     GROUP BY lane
)
SELECT k.pid, k.host, l.type, sum((SELECT sum(upper(r) - lower(r)) FROM unnest(c.ids * k.running) r))::bigint AS tasks,
       extract(epoch FROM clock_timestamp() - min(c.claimed_at))::double precision AS oldest, max(u.seconds)::double precision AS usual
  FROM fastq.claim c JOIN fastq.consumer k ON k.id = c.consumer JOIN fastq.lane l ON l.id = c.lane LEFT JOIN usual u ON u.lane = c.lane
 WHERE k.dead_at IS NULL AND NOT isempty(c.ids * k.running)
   AND extract(epoch FROM clock_timestamp() - c.claimed_at) > greatest($1::double precision, $2::double precision * coalesce(u.seconds, 0))
 GROUP BY k.id, k.pid, k.host, l.type ORDER BY oldest DESC
