-- The consumers that were alive within $1 seconds.
SELECT id, pid, host, version, stopping, types, queues, extract(epoch FROM clock_timestamp() - beat_at)::double precision AS silent_for
  FROM fastq.consumer WHERE dead_at IS NULL AND beat_at > clock_timestamp() - $1::double precision * interval '1 second'
 ORDER BY started_at, id
