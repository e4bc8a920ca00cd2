-- After a commit whose answer was lost: which of these ids are there, in leaf $1 or waiting for their time?
SELECT id FROM fastq.task WHERE leaf = $1::smallint AND id = ANY ($2::bigint[])
UNION ALL
SELECT id FROM fastq.delayed WHERE id = ANY ($2)
