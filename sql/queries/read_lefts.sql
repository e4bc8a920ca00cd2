-- The microseconds that tasks $2 to $3 of leaf $1 have left until they expire, of those that do.
SELECT id, (extract(epoch FROM expires_at - clock_timestamp()) * 1000000)::bigint AS left_us
  FROM fastq.task WHERE leaf = $1::smallint AND id BETWEEN $2::bigint AND $3::bigint AND expires_at IS NOT NULL
