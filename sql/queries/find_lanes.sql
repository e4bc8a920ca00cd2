-- The lanes of types $1 and queues $2 (NULL: of all).
SELECT id FROM fastq.lane WHERE ($1::text[] IS NULL OR type = ANY ($1)) AND ($2::text[] IS NULL OR queue = ANY ($2))
