-- Dead consumers that hold nothing any more are forgotten; only by the leader ($1, term $2).
DELETE FROM fastq.consumer k
 WHERE k.dead_at IS NOT NULL AND NOT EXISTS (SELECT FROM fastq.claim c WHERE c.consumer = k.id)
   AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
