-- Under lock_leaf, in a statement of its own: may leaf $3 be emptied? Closed, named by nothing that waits or runs, and its newest
-- completion older than $4 seconds; only for the leader ($1, term $2). One statement: over several a moving task is not seen.
SELECT EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
   AND EXISTS (SELECT FROM fastq.leaf WHERE no = $3::smallint AND state = 'closed')
   AND NOT EXISTS (SELECT FROM fastq.claim WHERE leaf = $3)
   AND NOT EXISTS (SELECT FROM fastq.delayed WHERE leaf = $3)
   AND NOT EXISTS (SELECT FROM fastq.done WHERE leaf = $3 AND done_at > clock_timestamp() - $4::double precision * interval '1 second')
   AND NOT EXISTS (SELECT FROM fastq.ready WHERE leaf = $3) AS may_go
