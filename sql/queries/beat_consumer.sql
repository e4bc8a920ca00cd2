-- The heartbeat: alive, and running these, under claims up to number $5; $4 results of this process were refused since it started. No row: it was declared dead.
-- Answers the claims that the database says it holds, so that one whose answer was lost is found.
WITH beat AS (
    UPDATE fastq.consumer SET beat_at = clock_timestamp(), running = $2::int8multirange, stopping = $3::boolean, refused = $4::bigint, last_no = $5::bigint,
           refused_at = CASE WHEN $4 > refused THEN clock_timestamp() ELSE refused_at END
     WHERE id = $1::bigint AND dead_at IS NULL RETURNING id
)
SELECT EXISTS (SELECT FROM beat) AS alive, ARRAY (SELECT no FROM fastq.claim WHERE consumer = $1) AS held
