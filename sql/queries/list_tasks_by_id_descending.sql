-- Up to $1 tasks in falling order of id, below id $2 (9223372036854775807: from the top), of lanes $3 (NULL: all), of the kinds of
-- pending in $4 (ready, scheduled, retrying), running if $5, completed if $6, of the ends in $7. Each state walks an index of its own and stops.
WITH page AS MATERIALIZED (
    -- Chunks do not overlap: what lies below the id is in those that end there and in the first that ends behind it.
    (SELECT i AS id, 'pending' AS state, NULL AS kind, lane, leaf, attempts, max_attempts, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at
       FROM ((SELECT lo, hi, lane, leaf, attempts, max_attempts FROM fastq.ready
               WHERE hi < $2::bigint AND ($3::integer[] IS NULL OR lane = ANY ($3)) AND 'ready' = ANY ($4::text[])
               ORDER BY hi DESC LIMIT $1::bigint)
             UNION ALL
             SELECT lo, $2 - 1, lane, leaf, attempts, max_attempts
               FROM (SELECT * FROM fastq.ready WHERE hi >= $2 AND 'ready' = ANY ($4) ORDER BY hi LIMIT 1) edge
              WHERE $3 IS NULL OR lane = ANY ($3)) r,
            generate_series(hi, greatest(lo, hi - $1 + 1), -1) i
      ORDER BY i DESC LIMIT $1)
    UNION ALL
    (SELECT id, 'pending', kind, lane, leaf, attempts, max_attempts, run_at, NULL FROM fastq.delayed
      WHERE id < $2 AND ($3 IS NULL OR lane = ANY ($3)) AND kind = ANY ($4) ORDER BY id DESC LIMIT $1)
    UNION ALL
    (SELECT i, 'running', NULL, lane, leaf, (attempts + 1)::smallint, max_attempts, NULL, NULL
       FROM (SELECT lower(r) AS lo, least(upper(r), $2) - 1 AS hi, lane, leaf, attempts, max_attempts FROM fastq.claim, unnest(ids) r
              WHERE $5::boolean AND lower(r) < $2 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lower(r) DESC LIMIT $1) c,
            generate_series(hi, greatest(lo, hi - $1 + 1), -1) i
      ORDER BY i DESC LIMIT $1)
    UNION ALL
    -- Each row brings its lo, and no id lies 1,024 above it: the first $1 ids are in the first $1 + 1,023 rows.
    (SELECT i, 'completed', NULL, lane, leaf, attempts, NULL, NULL, done_at
       FROM (SELECT ids, lane, leaf, attempts, done_at FROM fastq.done
              WHERE $6::boolean AND lo < $2 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lo DESC LIMIT $1 + 1023) d,
            unnest(ids) r, generate_series(least(upper(r), $2) - 1, greatest(lower(r), least(upper(r), $2) - $1), -1) i
      ORDER BY i DESC LIMIT $1)
    UNION ALL
    (SELECT id, state, NULL, lane, NULL, attempts, max_attempts, NULL, ended_at FROM fastq.dead
      WHERE id < $2 AND ($3 IS NULL OR lane = ANY ($3)) AND state = ANY ($7::text[]) ORDER BY id DESC LIMIT $1)
    ORDER BY 1 DESC LIMIT $1
)
SELECT f.id, l.type, l.queue, l.priority, coalesce(t.format, o.format)::text AS format, coalesce(t.payload, o.payload) AS payload,
       f.state, f.kind, f.attempts, coalesce(f.max_attempts, t.max_attempts) AS max_attempts, coalesce(t.created_at, o.created_at) AS created_at,
       f.run_at, f.ended_at, coalesce(t.expires_at, o.expires_at) AS expires_at
  FROM page f JOIN fastq.lane l ON l.id = f.lane
       LEFT JOIN LATERAL (SELECT created_at, max_attempts, format, payload, expires_at FROM fastq.task
                           WHERE task.leaf = f.leaf AND task.id = f.id OFFSET 0) t ON true
       LEFT JOIN LATERAL (SELECT created_at, format, payload, expires_at FROM fastq.delayed WHERE delayed.id = f.id AND f.leaf IS NULL
                          UNION ALL
                          SELECT created_at, format, payload, expires_at FROM fastq.dead WHERE dead.id = f.id AND f.leaf IS NULL) o ON true
 ORDER BY f.id DESC
