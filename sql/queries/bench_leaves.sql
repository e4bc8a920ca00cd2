-- The leaves, and which are open, closed or empty.
SELECT no, state FROM fastq.leaf
