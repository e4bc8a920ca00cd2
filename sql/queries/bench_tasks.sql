-- How many tasks are in each table that holds some, and how many have their content.
SELECT (SELECT count(*) FROM fastq.task) AS tasks,
       (SELECT coalesce(sum(hi - lo + 1), 0)::bigint FROM fastq.ready) AS ready,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM fastq.claim c, unnest(c.ids) r) AS claimed,
       (SELECT count(*) FROM fastq.delayed) AS delayed,
       (SELECT count(*) FROM fastq.dead) AS dead,
       (SELECT count(*) FROM fastq.attempt_error) AS errors,
       (SELECT count(*) FROM fastq.token) AS tokens
