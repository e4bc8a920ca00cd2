-- Forget failed attempts older than $3 seconds whose task is kept nowhere: looks at the next $5 after task id $4 (0: from the start);
-- only the leader ($1, term $2). Answers how many went and the id to go on after (NULL: all were seen). What waits, runs or
-- completed has its content in a leaf; the two other places carry it.
WITH seen AS MATERIALIZED (
    SELECT id, failed_at FROM fastq.attempt_error
     WHERE id > $4::bigint AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY id LIMIT $5::bigint
), old AS MATERIALIZED (
    SELECT id FROM seen GROUP BY id HAVING max(failed_at) < statement_timestamp() - $3::double precision * interval '1 second'
), gone AS (
    DELETE FROM fastq.attempt_error WHERE id = ANY (ARRAY (
        SELECT o.id FROM old o
         WHERE NOT EXISTS (SELECT FROM fastq.task t WHERE t.id = o.id OFFSET 0)
           AND NOT EXISTS (SELECT FROM fastq.delayed d WHERE d.id = o.id OFFSET 0)
           AND NOT EXISTS (SELECT FROM fastq.dead d WHERE d.id = o.id OFFSET 0))) RETURNING id
)
SELECT (SELECT count(*) FROM gone) AS errors, CASE count(*) WHEN $5 THEN max(id) END AS last_id FROM seen
