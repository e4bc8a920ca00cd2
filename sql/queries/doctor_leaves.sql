-- The leaves that are in use, the oldest first: since when (seconds), and what of the small tables names each. Waiting chunks, which no
-- index finds by their leaf, are moved on by the leader anyway.
SELECT no, state, extract(epoch FROM clock_timestamp() - coalesce(closed_at, opened_at))::double precision AS age,
       (SELECT count(*) FROM fastq.claim c WHERE c.leaf = l.no) AS claims, EXISTS (SELECT FROM fastq.delayed d WHERE d.leaf = l.no) AS has_delayed
  FROM fastq.leaf l WHERE state <> 'empty' ORDER BY state, closed_at
