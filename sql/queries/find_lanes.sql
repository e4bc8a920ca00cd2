-- The lanes of types $1, queues $2 and priorities $3 (NULL: of all).
SELECT id FROM fastq.lane WHERE ($1::text[] IS NULL OR type = ANY ($1)) AND ($2::text[] IS NULL OR queue = ANY ($2))
   AND ($3::smallint[] IS NULL OR priority = ANY ($3))
