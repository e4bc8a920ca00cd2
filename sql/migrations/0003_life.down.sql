-- Undo step 3: what a deletion looks tokens up by.
DROP INDEX fastq.token_id;
