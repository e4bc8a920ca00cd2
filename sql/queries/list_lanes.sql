-- The lanes of types $1, and of those that begin with one of $3, in queues $2 (NULL: in all).
SELECT id, type, queue, priority FROM fastq.lane WHERE (type = ANY ($1::text[]) OR type ^@ ANY ($3::text[])) AND ($2::text[] IS NULL OR queue = ANY ($2)) ORDER BY id
