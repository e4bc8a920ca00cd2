INSERT INTO fastq.lane (queue, type, priority) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
