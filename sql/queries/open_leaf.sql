-- Once the open leaf is older than $3 seconds: close it and open the next empty one in ring order; only the leader ($1, term $2).
-- None is empty: the open one goes on growing. Of two leaders the second waits for the row, sees it closed and does nothing.
WITH current AS MATERIALIZED (
    SELECT no FROM fastq.leaf
     WHERE state = 'open' AND opened_at < statement_timestamp() - $3::double precision * interval '1 second'
       AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     FOR NO KEY UPDATE
), next AS MATERIALIZED (
    SELECT l.no FROM fastq.leaf l, current c WHERE l.state = 'empty' ORDER BY (l.no - c.no + 16) % 16 LIMIT 1 FOR NO KEY UPDATE OF l
), closed AS (
    UPDATE fastq.leaf SET state = 'closed', closed_at = clock_timestamp() WHERE no = (SELECT c.no FROM current c, next)
)
UPDATE fastq.leaf SET state = 'open', opened_at = clock_timestamp(), closed_at = NULL WHERE no = (SELECT no FROM next) RETURNING no
