-- The consumers: since when each is silent and dead (seconds), what it holds, and what was refused of its results.
SELECT k.pid, k.host, k.version, k.stopping, extract(epoch FROM clock_timestamp() - k.beat_at)::double precision AS silent,
       extract(epoch FROM clock_timestamp() - k.dead_at)::double precision AS dead,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM fastq.claim c, unnest(c.ids) r WHERE c.consumer = k.id)::bigint AS tasks,
       k.refused, extract(epoch FROM clock_timestamp() - k.refused_at)::double precision AS refused_ago
  FROM fastq.consumer k ORDER BY k.started_at, k.id
