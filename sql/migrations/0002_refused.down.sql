-- Undo step 2: the numbers of refused results go.
ALTER TABLE fastq.consumer DROP COLUMN refused, DROP COLUMN refused_at;
