-- The lanes of types $1 in queues $2 (NULL: in all), those of higher priority first.
SELECT id, type, queue FROM fastq.lane WHERE type = ANY ($1::text[]) AND ($2::text[] IS NULL OR queue = ANY ($2)) ORDER BY priority DESC, id
