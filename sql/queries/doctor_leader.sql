-- Who leads, for how long still (seconds; below 0: no more), and how long the first delayed task has been due.
SELECT l.term, extract(epoch FROM l.expires_at - clock_timestamp())::double precision AS lasts, k.pid, k.host,
       extract(epoch FROM clock_timestamp() - (SELECT run_at FROM fastq.delayed ORDER BY run_at LIMIT 1))::double precision AS overdue
  FROM (SELECT) one LEFT JOIN fastq.leader l ON true LEFT JOIN fastq.consumer k ON k.id = l.holder
