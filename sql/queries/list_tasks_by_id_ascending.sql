-- Up to $1 tasks in rising order of id, above id $2 (0: from the bottom), of lanes $3 (NULL: all), of the kinds of pending in $4
-- (ready, scheduled, retrying), running if $5, completed if $6, of the ends in $7. Each state walks an index of its own and stops.
WITH page AS MATERIALIZED (
    -- Chunks do not overlap: all that ends above the id lies above it, but for a part of the first.
    (SELECT i AS id, 'pending' AS state, NULL AS kind, lane, leaf, attempts, max_attempts, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at
       FROM (SELECT greatest(lo, $2::bigint + 1) AS lo, hi, lane, leaf, attempts, max_attempts FROM fastq.ready
              WHERE hi > $2 AND ($3::integer[] IS NULL OR lane = ANY ($3)) AND 'ready' = ANY ($4::text[])
              ORDER BY ready.hi LIMIT $1::bigint) r,
            generate_series(lo, least(hi, lo + $1 - 1)) i
      ORDER BY i LIMIT $1)
    UNION ALL
    (SELECT id, 'pending', kind, lane, leaf, attempts, max_attempts, run_at, NULL FROM fastq.delayed
      WHERE id > $2 AND ($3 IS NULL OR lane = ANY ($3)) AND kind = ANY ($4) ORDER BY id LIMIT $1)
    UNION ALL
    (SELECT i, 'running', NULL, lane, leaf, (attempts + 1)::smallint, max_attempts, NULL, NULL
       FROM (SELECT greatest(lower(r), $2 + 1) AS lo, upper(r) - 1 AS hi, lane, leaf, attempts, max_attempts FROM fastq.claim, unnest(ids) r
              WHERE $5::boolean AND upper(r) > $2 + 1 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lower(r) LIMIT $1) c,
            generate_series(lo, least(hi, lo + $1 - 1)) i
      ORDER BY i LIMIT $1)
    UNION ALL
    -- A row's ids lie less than 1,024 above its lo: the first $1 above the id are in the rows that begin so far below it, and $1 more.
    (SELECT i, 'completed', NULL, lane, leaf, attempts, NULL, NULL, done_at
       FROM (SELECT ids, lane, leaf, attempts, done_at FROM fastq.done
              WHERE $6::boolean AND lo > $2 - 1024 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lo LIMIT $1 + 1024) d,
            unnest(ids) r, generate_series(greatest(lower(r), $2 + 1), least(upper(r), greatest(lower(r), $2 + 1) + $1) - 1) i
      ORDER BY i LIMIT $1)
    UNION ALL
    (SELECT id, state, NULL, lane, NULL, attempts, max_attempts, NULL, ended_at FROM fastq.dead
      WHERE id > $2 AND ($3 IS NULL OR lane = ANY ($3)) AND state = ANY ($7::text[]) ORDER BY id LIMIT $1)
    ORDER BY 1 LIMIT $1
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
 ORDER BY f.id
