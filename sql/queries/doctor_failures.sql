-- Tasks that failed for good in the last $1 seconds, by type; looks at the last $2.
SELECT l.type, count(*) AS tasks, max(d.id) AS last_id
  FROM (SELECT id, lane FROM fastq.dead WHERE ended_at > statement_timestamp() - $1::double precision * interval '1 second' AND state = 'failed'
         ORDER BY ended_at DESC LIMIT $2::bigint) d
  JOIN fastq.lane l ON l.id = d.lane GROUP BY l.type ORDER BY tasks DESC, l.type
