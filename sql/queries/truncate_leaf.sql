-- After check_leaf_empty said yes and free_leaf, in the same transaction, whose end is sent along with it. Waits for readers at most as long as lock_timeout allows, each table in its turn:
-- `done` first, which no claim reads, so that a claim never waits for more than one such time, and the truncation itself.
TRUNCATE ONLY fastq.done_{leaf}, ONLY fastq.task_{leaf}
