-- Undo step 1: every task, waiting, running or ended, goes with it.
DROP VIEW fastq.tasks;
DROP TABLE fastq.leader, fastq.consumer, fastq.token, fastq.attempt_error, fastq.dead, fastq.delayed, fastq.claim, fastq.ready, fastq.done, fastq.task, fastq.leaf, fastq.lane;
DROP SEQUENCE fastq.rid, fastq.task_id;
