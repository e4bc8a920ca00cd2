-- The schema steps that were applied, in order.
SELECT version, name, oldest, applied_at FROM fastq.migration ORDER BY version
