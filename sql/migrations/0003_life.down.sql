-- Undo step 3: what a deletion looks tokens up by, what retention finds the dead by, and the results that were kept.
DROP INDEX fastq.token_id, fastq.dead_lane_ended_at;
DROP TABLE fastq.result;
