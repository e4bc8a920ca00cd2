DELETE FROM fastq.migration WHERE version = $1::integer
