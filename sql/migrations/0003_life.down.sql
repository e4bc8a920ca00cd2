-- Undo step 3: what a deletion looks tokens up by, what retention finds the dead by, the results that were kept, and the archive.
DROP INDEX IF EXISTS fastq.token_id, fastq.dead_lane_ended_at;
DROP TABLE fastq.result;
DROP TABLE fastq.archive;

-- And how long a token is held: all are held while their task is kept again.
ALTER TABLE fastq.token DROP COLUMN expires_at, DROP COLUMN until_end;

-- Beats name ids alone again.
ALTER TABLE fastq.consumer DROP COLUMN last_no;

-- And when claimed tasks expire, and what looked for those that did.
DROP INDEX IF EXISTS fastq.delayed_expires_at, fastq.ready_expires_at;
ALTER TABLE fastq.claim DROP COLUMN expires_at;
