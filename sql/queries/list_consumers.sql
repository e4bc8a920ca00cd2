-- The consumers, the oldest first: who and since when, when they last said so, what they handle, whether one leads, which tasks it ran at its
-- last heartbeat, how many it holds now, and how many of its results were refused.
SELECT k.id, k.host, k.pid, k.version, k.started_at, k.beat_at, k.dead_at, k.stopping, k.types, k.queues,
       EXISTS (SELECT FROM fastq.leader l WHERE l.holder = k.id AND l.expires_at > clock_timestamp()) AS leads,
       ARRAY (SELECT i FROM unnest(k.running) r, generate_series(lower(r), upper(r) - 1) i) AS running,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM fastq.claim c, unnest(c.ids) r WHERE c.consumer = k.id)::bigint AS claimed,
       k.refused
  FROM fastq.consumer k ORDER BY k.started_at, k.id
