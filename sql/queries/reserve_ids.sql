-- Reserve $1 blocks of 1,000 ids each; answers their first ids. pg_current_xact_id() makes the commit wait for the log:
-- without it a crash handed the same blocks out again.
SELECT nextval('fastq.task_id') AS lo, pg_current_xact_id()::text, (SELECT no FROM fastq.leaf WHERE state = 'open' LIMIT 1) AS open_leaf
  FROM generate_series(1, $1::integer)
