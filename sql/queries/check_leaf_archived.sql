-- Under lock_leaf, after check_leaf_empty, where completed tasks are archived: does leaf $1 hold none any more of the queues ($2; NULL: all that are
-- not named) of which $3 says so? One that came since the leaf was looked through, or that somebody held, would be lost.
SELECT NOT EXISTS (
    SELECT FROM fastq.done
     WHERE leaf = $1::smallint
       AND lane = ANY (ARRAY (SELECT l.id FROM fastq.lane l
                               WHERE (SELECT r.is_archived FROM unnest($2::text[], $3::boolean[]) AS r (queue, is_archived)
                                       WHERE r.queue IS NULL OR r.queue = l.queue ORDER BY r.queue NULLS LAST LIMIT 1)))) AS may_go
