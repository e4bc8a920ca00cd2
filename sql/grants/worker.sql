-- A worker: enqueues tasks, claims and runs them, and does the upkeep while it leads; a client with its rights cancels, retries, edits and
-- deletes tasks. Rows alone: no table is made, changed or dropped.
GRANT USAGE ON SCHEMA fastq TO fastq_worker;
GRANT USAGE ON SEQUENCE fastq.task_id, fastq.rid TO fastq_worker;
GRANT SELECT ON TABLE fastq.migration, fastq.tasks TO fastq_worker;
GRANT SELECT, INSERT ON TABLE fastq.lane TO fastq_worker;
GRANT SELECT, UPDATE ON TABLE fastq.leaf TO fastq_worker;
GRANT SELECT, INSERT, UPDATE ON TABLE fastq.leader TO fastq_worker;
GRANT SELECT, INSERT, DELETE ON TABLE fastq.attempt_error TO fastq_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE fastq.ready, fastq.claim, fastq.delayed, fastq.dead, fastq.result, fastq.token, fastq.consumer TO fastq_worker;
-- What retention removes is archived where that is set.
GRANT SELECT, INSERT ON TABLE fastq.archive TO fastq_worker;
-- Contents and completions are written once; a client that edits, retries or deletes a task changes its own.
GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE fastq.task, fastq.done TO fastq_worker;
-- Leaves are filled one by one, and emptied whole at the end of retention.
GRANT INSERT, TRUNCATE ON TABLE
    fastq.task_00, fastq.task_01, fastq.task_02, fastq.task_03, fastq.task_04, fastq.task_05, fastq.task_06, fastq.task_07,
    fastq.task_08, fastq.task_09, fastq.task_10, fastq.task_11, fastq.task_12, fastq.task_13, fastq.task_14, fastq.task_15 TO fastq_worker;
GRANT TRUNCATE ON TABLE
    fastq.done_00, fastq.done_01, fastq.done_02, fastq.done_03, fastq.done_04, fastq.done_05, fastq.done_06, fastq.done_07,
    fastq.done_08, fastq.done_09, fastq.done_10, fastq.done_11, fastq.done_12, fastq.done_13, fastq.done_14, fastq.done_15 TO fastq_worker;
