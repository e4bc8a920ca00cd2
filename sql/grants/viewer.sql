-- A viewer: looks at tasks (payloads, results, errors and tokens too), consumers and leaves, and changes nothing.
GRANT USAGE ON SCHEMA fastq TO fastq_viewer;
GRANT SELECT ON TABLE fastq.migration, fastq.tasks, fastq.lane, fastq.leaf, fastq.task, fastq.done, fastq.ready, fastq.claim,
    fastq.delayed, fastq.dead, fastq.archive, fastq.attempt_error, fastq.result, fastq.token, fastq.consumer, fastq.leader TO fastq_viewer;
