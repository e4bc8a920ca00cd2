-- Free tokens whose time is over, and of those without one what is older than $3 seconds and whose task is kept nowhere: looks at the next $6
-- after type $4 and token $5 (two empty texts: from the start); only the leader ($1, term $2). Answers how many went and the key to go on
-- after (NULL: all were seen). One that a new task has taken over meanwhile stays: the id decides, on the locked row.
WITH seen AS MATERIALIZED (
    SELECT type, token, id, created_at, expires_at, row_number() OVER (ORDER BY type, token) AS n FROM fastq.token
     WHERE (type, token) > ($4::text, $5::text) AND EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
     ORDER BY type, token LIMIT $6::bigint
), free AS MATERIALIZED (
    SELECT type, token, id FROM seen s
     WHERE expires_at <= statement_timestamp()
        OR (expires_at IS NULL
            AND created_at < statement_timestamp() - $3::double precision * interval '1 second'
            AND NOT EXISTS (SELECT FROM fastq.task t WHERE t.id = s.id OFFSET 0)
            AND NOT EXISTS (SELECT FROM fastq.delayed d WHERE d.id = s.id OFFSET 0)
            AND NOT EXISTS (SELECT FROM fastq.dead d WHERE d.id = s.id OFFSET 0))
), gone AS (
    DELETE FROM fastq.token t USING free f WHERE t.type = f.type AND t.token = f.token AND t.id = f.id RETURNING t.id
)
SELECT (SELECT count(*) FROM gone) AS tokens, l.type AS last_type, l.token AS last_token
  FROM (SELECT) one LEFT JOIN (SELECT type, token FROM seen WHERE n = $6) l ON true
