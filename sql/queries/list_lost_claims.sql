-- The tasks of up to $3 claims of dead or unknown consumers, without those in $4: what a rescue that failed as a whole is split into;
-- only for the leader ($1, term $2).
SELECT c.ids - $4::int8multirange AS ids
  FROM fastq.claim c LEFT JOIN fastq.consumer k ON k.id = c.consumer
 WHERE (k.id IS NULL OR k.dead_at IS NOT NULL) AND NOT isempty(c.ids - $4)
   AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
 ORDER BY c.consumer, c.no LIMIT $3::bigint
