-- A producer: enqueues tasks, now or for later, with tokens or without. Of tasks that wait, run or completed it can read the payload:
-- where the answer to a commit was lost, it looks whether what is there is what it sent. It sees nothing of attempts and failures.
GRANT USAGE ON SCHEMA fastq TO fastq_producer;
GRANT USAGE ON SEQUENCE fastq.task_id, fastq.rid TO fastq_producer;
GRANT SELECT ON TABLE fastq.migration, fastq.leaf TO fastq_producer;
GRANT SELECT, INSERT ON TABLE fastq.lane, fastq.token TO fastq_producer;
-- A token that is held until its task has ended, or for a time, is taken over where it is met; for that it is looked whether the task lives.
GRANT UPDATE (id, created_at, expires_at, until_end) ON TABLE fastq.token TO fastq_producer;
GRANT SELECT (lo, hi) ON TABLE fastq.ready TO fastq_producer;
GRANT SELECT (ids) ON TABLE fastq.claim TO fastq_producer;
GRANT INSERT ON TABLE fastq.task, fastq.ready, fastq.delayed TO fastq_producer;
GRANT SELECT (id, lane, payload) ON TABLE fastq.task, fastq.delayed TO fastq_producer;
GRANT INSERT ON TABLE
    fastq.task_00, fastq.task_01, fastq.task_02, fastq.task_03, fastq.task_04, fastq.task_05, fastq.task_06, fastq.task_07,
    fastq.task_08, fastq.task_09, fastq.task_10, fastq.task_11, fastq.task_12, fastq.task_13, fastq.task_14, fastq.task_15 TO fastq_producer;
