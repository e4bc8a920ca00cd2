-- Leaves that were closed longer ago than completed tasks are kept ($1 seconds), the oldest first.
SELECT no FROM fastq.leaf WHERE state = 'closed' AND closed_at < clock_timestamp() - $1::double precision * interval '1 second' ORDER BY closed_at
