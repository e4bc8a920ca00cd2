-- Take tokens for new tasks, sorted by the caller (unsorted loads deadlocked); answers the ids of those that were free.
INSERT INTO fastq.token (type, token, id) SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[]) ON CONFLICT DO NOTHING RETURNING id
