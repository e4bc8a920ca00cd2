INSERT INTO fastq.consumer (id, pid, host, version, types, queues) VALUES ($1, $2, $3, $4, $5, $6)
