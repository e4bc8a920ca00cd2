-- Claims of consumers that are dead or forgotten, older than $1 seconds: a rescue should have taken them.
SELECT k.pid, k.host, extract(epoch FROM clock_timestamp() - k.dead_at)::double precision AS dead, count(*) AS claims,
       sum((SELECT sum(upper(r) - lower(r)) FROM unnest(c.ids) r))::bigint AS tasks,
       extract(epoch FROM clock_timestamp() - min(c.claimed_at))::double precision AS oldest
  FROM fastq.claim c LEFT JOIN fastq.consumer k ON k.id = c.consumer
 WHERE (k.id IS NULL OR k.dead_at < clock_timestamp() - $1::double precision * interval '1 second')
   AND c.claimed_at < clock_timestamp() - $1 * interval '1 second'
 GROUP BY c.consumer, k.pid, k.host, k.dead_at ORDER BY oldest DESC
