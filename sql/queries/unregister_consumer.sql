-- A consumer that leaves in order: gone once it holds nothing, else left for the rescuer at once.
WITH idle AS (
    DELETE FROM fastq.consumer WHERE id = $1::bigint AND NOT EXISTS (SELECT FROM fastq.claim WHERE consumer = $1) RETURNING id
)
UPDATE fastq.consumer SET dead_at = clock_timestamp(), stopping = true, running = $2::int8multirange, last_no = $3::bigint
 WHERE id = $1 AND dead_at IS NULL AND NOT EXISTS (SELECT FROM idle)
