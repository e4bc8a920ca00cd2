-- Undo step 3: what a deletion looks tokens up by, and what retention finds the dead by.
DROP INDEX fastq.token_id, fastq.dead_lane_ended_at;
