-- What became of tasks $1, all at one moment: id, place and, where it is kept, the result with its format (place: result). Else the place is
-- waiting, running, completed, or how it ended badly; no row: it is nowhere. Where a task is that has not ended is looked up first: that is
-- what nearly every look finds. Claims are read once, being few.
WITH held AS MATERIALIZED (
    SELECT range_agg(r) AS ids
      FROM (SELECT range_agg(int8range(i, i, '[]')) AS ids FROM unnest($1::bigint[]) i) s, fastq.claim c, unnest(c.ids * s.ids) r
     WHERE c.ids && s.ids
)
SELECT i AS id, f.place, f.format, f.value
  FROM unnest($1) i,
       LATERAL (SELECT 'result' AS place, format::text, value FROM fastq.result WHERE id = i AND expires_at > statement_timestamp()
                UNION ALL
                SELECT 'running', NULL, NULL FROM held WHERE ids @> i
                UNION ALL
                SELECT 'waiting', NULL, NULL FROM (SELECT lo FROM fastq.ready WHERE hi >= i ORDER BY hi LIMIT 1) r WHERE lo <= i
                UNION ALL
                SELECT 'waiting', NULL, NULL FROM fastq.delayed WHERE id = i
                UNION ALL
                SELECT state, NULL, NULL FROM fastq.dead WHERE id = i
                UNION ALL
                SELECT 'completed', NULL, NULL FROM fastq.done WHERE lo BETWEEN i - 1023 AND i AND ids @> i
                LIMIT 1) f
