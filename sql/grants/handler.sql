-- A handler's own connection: completes the task that it runs in its transaction (task.complete_tx), and sees nothing of what is enqueued.
-- It names a claim, and whoever may do that may end any task that runs.
GRANT USAGE ON SCHEMA fastq TO fastq_handler;
GRANT SELECT ON TABLE fastq.migration TO fastq_handler;
GRANT SELECT (consumer, no, lane, leaf, attempts, ids) ON TABLE fastq.claim TO fastq_handler;
GRANT DELETE ON TABLE fastq.claim TO fastq_handler;
GRANT INSERT ON TABLE fastq.done TO fastq_handler;
