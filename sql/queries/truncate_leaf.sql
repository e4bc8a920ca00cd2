-- After check_leaf_empty said yes, in the same transaction. Waits for readers at most as long as lock_timeout allows.
TRUNCATE ONLY fastq.task_{leaf}, ONLY fastq.done_{leaf}
