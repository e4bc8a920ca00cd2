-- After a commit whose answer was lost: which of these ids are there, as which content? In any leaf: a delayed task may have been
-- promoted since, to the leaf that was open then.
SELECT id, lane, payload FROM fastq.task WHERE id = ANY ($1::bigint[])
UNION ALL
SELECT id, lane, payload FROM fastq.delayed WHERE id = ANY ($1) AND payload IS NOT NULL
