-- Waits until the log is as durable as `synchronous_commit` asks, up to here: with it every commit that was seen before. A message in the
-- log that nothing reads, since a transaction that writes nothing waits for nothing.
SELECT pg_logical_emit_message(true, 'fastq', '')
