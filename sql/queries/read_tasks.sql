-- The content of single tasks of one leaf ($1), asked for again when a claim brought fewer rows than ids.
SELECT id, created_at, format, payload FROM fastq.task WHERE leaf = $1::smallint AND id = ANY ($2::bigint[])
