-- Where tasks $1 are, all at one moment: id, lane, and ready, scheduled, retrying, running, completed, or how it ended badly. Claims are read once, being few.
SELECT i AS id, f.lane, f.place
  FROM unnest($1::bigint[]) i,
       LATERAL (SELECT lane, 'ready' AS place FROM (SELECT lo, lane FROM fastq.ready WHERE hi >= i ORDER BY hi LIMIT 1) r WHERE lo <= i
                UNION ALL
                SELECT lane, kind FROM fastq.delayed WHERE id = i
                UNION ALL
                SELECT lane, 'completed' FROM fastq.done WHERE lo BETWEEN i - 1023 AND i AND ids @> i
                UNION ALL
                SELECT lane, state FROM fastq.dead WHERE id = i
                OFFSET 0) f
UNION ALL
SELECT i, c.lane, 'running'
  FROM (SELECT range_agg(int8range(i, i, '[]')) AS ids FROM unnest($1) i) s, fastq.claim c, unnest(c.ids * s.ids) r, generate_series(lower(r), upper(r) - 1) i
 WHERE c.ids && s.ids
