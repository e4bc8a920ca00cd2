-- Binary rows of tasks straight into the open leaf: {leaf} is its two-digit number. created_at is its default.
COPY fastq.task_{leaf} (id, lane, leaf, max_attempts, format, payload) FROM STDIN (FORMAT binary)
