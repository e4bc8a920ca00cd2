-- The schema's last step, and the oldest fastq that it still works with.
SELECT version, oldest FROM fastq.migration ORDER BY version DESC LIMIT 1
