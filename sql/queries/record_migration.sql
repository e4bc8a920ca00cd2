INSERT INTO fastq.migration (version, name, oldest) VALUES ($1::integer, $2::text, $3::text) RETURNING applied_at
