-- A leader that leaves in order lets another lead at once: its lease ends now.
UPDATE fastq.leader SET expires_at = clock_timestamp() WHERE holder = $1::bigint AND term = $2::bigint
