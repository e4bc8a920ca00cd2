-- Leaves that hold tasks, the oldest first.
SELECT no FROM fastq.leaf WHERE state <> 'empty' ORDER BY opened_at
