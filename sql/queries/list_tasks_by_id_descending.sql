-- Up to $1 tasks in falling order of id, below id $2 (9223372036854775807: from the top), and not below $8, of lanes $3 (NULL: all), of the kinds of
-- pending in $4 (ready, scheduled, retrying), running if $5, completed if $6, of the ends in $7; created from $9 on and before $10, with
-- $11 in their payload (NULL: whenever, whatever). Each state walks an index of its own and stops.
-- What it looks at is bounded: $12 rows of a table (more than 1,023), $13 tasks, 32 MiB of payload. Each row says `edge`, the first one
-- too where there is no task: if it is not NULL, what lies below it has not been looked at.
WITH ready AS MATERIALIZED (
    -- Chunks do not overlap: what lies below the id is in those that end there and in the first that ends behind it.
    SELECT greatest(lo, $8::bigint) AS lo, hi, lane, leaf, attempts, max_attempts
      FROM ((SELECT lo, hi, lane, leaf, attempts, max_attempts FROM fastq.ready
              WHERE hi < $2::bigint AND hi >= $8 AND 'ready' = ANY ($4::text[]) ORDER BY hi DESC LIMIT $12::bigint)
            UNION ALL
            SELECT lo, $2 - 1, lane, leaf, attempts, max_attempts
              FROM (SELECT * FROM fastq.ready WHERE hi >= $2 AND 'ready' = ANY ($4) ORDER BY hi LIMIT 1) edge) r
     WHERE lo <= hi AND hi >= $8 AND ($3::integer[] IS NULL OR lane = ANY ($3)) ORDER BY hi DESC LIMIT $13::bigint
), enough_ready AS MATERIALIZED (
    -- From here on there are as many as are looked at: what lies below, of any state, is not among them.
    SELECT greatest(max(lo), $8) AS lo FROM (SELECT lo, sum((hi - lo + 1)::integer) OVER (ORDER BY hi DESC) AS upto FROM ready) r WHERE upto >= $13
), completed_rows AS MATERIALIZED (
    -- Each row brings its lo, and no id lies 1,024 above it: the first $13 ids are in the first $13 + 1,023 rows.
    SELECT ids, lane, leaf, attempts, done_at
      FROM (SELECT lo, ids, lane, leaf, attempts, done_at FROM fastq.done
             WHERE $6::boolean AND lo < $2 AND lo > (SELECT lo FROM enough_ready) - 1024 ORDER BY lo DESC LIMIT $12) d
     WHERE ($3 IS NULL OR lane = ANY ($3)) ORDER BY lo DESC LIMIT $13 + 1023
), completed AS MATERIALIZED (
    SELECT greatest(lower(r), $8) AS lo, least(upper(r), $2) - 1 AS hi, lane, leaf, attempts, done_at
      FROM completed_rows, unnest(ids) r
     WHERE lower(r) < $2 AND upper(r) > $8 ORDER BY 2 DESC LIMIT $13
), enough AS MATERIALIZED (
    SELECT greatest(max(lo), (SELECT lo FROM enough_ready)) AS lo
      FROM (SELECT lo, sum((hi - lo + 1)::integer) OVER (ORDER BY hi DESC) AS upto FROM completed) d WHERE upto >= $13
), delayed AS MATERIALIZED (
    SELECT id, kind, lane, leaf, attempts, max_attempts, run_at
      FROM (SELECT id, kind, lane, leaf, attempts, max_attempts, run_at FROM fastq.delayed
             WHERE id < $2 AND id >= (SELECT lo FROM enough) AND cardinality($4) > 0 ORDER BY id DESC LIMIT $12) d
     WHERE ($3 IS NULL OR lane = ANY ($3)) AND kind = ANY ($4) ORDER BY id DESC LIMIT $13
), running AS MATERIALIZED (
    SELECT greatest(lower(r), $8) AS lo, least(upper(r), $2) - 1 AS hi, lane, leaf, (attempts + 1)::smallint AS attempts, max_attempts
      FROM fastq.claim, unnest(ids) r
     WHERE $5::boolean AND lower(r) < $2 AND upper(r) > $8 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY 2 DESC LIMIT $13
), dead AS MATERIALIZED (
    SELECT id, state, lane, attempts, max_attempts, ended_at
      FROM (SELECT id, state, lane, attempts, max_attempts, ended_at FROM fastq.dead
             WHERE id < $2 AND id >= (SELECT lo FROM enough) AND cardinality($7::text[]) > 0 ORDER BY id DESC LIMIT $12) d
     WHERE ($3 IS NULL OR lane = ANY ($3)) AND state = ANY ($7) ORDER BY id DESC LIMIT $13
), bound AS MATERIALIZED (
    -- Down to where all rows have been looked at. Asked for only where a table gave less than it might have.
    SELECT greatest(
               CASE WHEN (SELECT count(*) FROM ready) < $13 THEN
                   (SELECT lo FROM fastq.ready WHERE hi < $2 AND hi >= $8 AND 'ready' = ANY ($4) ORDER BY hi DESC OFFSET $12 - 1 LIMIT 1) END,
               CASE WHEN (SELECT count(*) FROM delayed) < $13 THEN
                   (SELECT id FROM fastq.delayed WHERE id < $2 AND id >= (SELECT lo FROM enough) AND cardinality($4) > 0 ORDER BY id DESC OFFSET $12 - 1 LIMIT 1) END,
               CASE WHEN (SELECT count(*) FROM completed_rows) < $13 + 1023 THEN
                   (SELECT lo + 1023 FROM fastq.done WHERE $6 AND lo < $2 AND lo > (SELECT lo FROM enough_ready) - 1024 ORDER BY lo DESC OFFSET $12 - 1 LIMIT 1) END,
               CASE WHEN (SELECT count(*) FROM dead) < $13 THEN
                   (SELECT id FROM fastq.dead WHERE id < $2 AND id >= (SELECT lo FROM enough) AND cardinality($7) > 0 ORDER BY id DESC OFFSET $12 - 1 LIMIT 1) END) AS edge
), every AS MATERIALIZED (
    SELECT lo, hi, 'pending' AS state, NULL AS kind, lane, leaf, attempts, max_attempts, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at FROM ready
    UNION ALL
    SELECT id, id, 'pending', kind, lane, leaf, attempts, max_attempts, run_at, NULL FROM delayed
    UNION ALL
    SELECT lo, hi, 'running', NULL, lane, leaf, attempts, max_attempts, NULL, NULL FROM running
    UNION ALL
    SELECT lo, hi, 'completed', NULL, lane, leaf, attempts, NULL, NULL, done_at FROM completed
    UNION ALL
    SELECT id, id, state, NULL, lane, NULL, attempts, max_attempts, NULL, ended_at FROM dead
    ORDER BY hi DESC LIMIT $13
), seen AS MATERIALIZED (
    -- The first $13 tasks of these runs, none of which overlap.
    SELECT greatest(lo, hi - $13 + skip + 1) AS lo, hi, state, kind, lane, leaf, attempts, max_attempts, run_at, ended_at, skip + hi - lo + 1 AS upto
      FROM (SELECT *, sum(least(hi - lo + 1, $13)::integer) OVER (ORDER BY hi DESC) - least(hi - lo + 1, $13) AS skip FROM every) e WHERE skip < $13
), looked AS MATERIALIZED (
    -- Payloads are read for a search alone, and no more than so many bytes.
    SELECT t.id, s.state, s.kind, s.lane, s.attempts, coalesce(s.max_attempts, t.max_attempts) AS max_attempts, s.run_at, s.ended_at,
           t.created_at, t.format, t.payload, t.expires_at,
           sum(CASE WHEN $11::bytea IS NOT NULL THEN octet_length(t.payload) END)
               OVER (ORDER BY t.id DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
      FROM (SELECT greatest(lo, coalesce((SELECT edge FROM bound), lo)) AS lo, hi, state, kind, lane, leaf, attempts, max_attempts, run_at, ended_at FROM seen WHERE (SELECT edge FROM bound) IS NULL OR hi >= (SELECT edge FROM bound) OFFSET 0) s,
           LATERAL (SELECT id, created_at, max_attempts, format, payload, expires_at FROM fastq.task
                     WHERE task.leaf = s.leaf AND task.id >= s.lo AND task.id <= s.hi
                    UNION ALL
                    SELECT id, created_at, max_attempts, format, payload, expires_at FROM fastq.delayed WHERE delayed.id = s.lo AND s.leaf IS NULL
                    UNION ALL
                    SELECT id, created_at, max_attempts, format, payload, expires_at FROM fastq.dead WHERE dead.id = s.lo AND s.leaf IS NULL
                    OFFSET 0) t
), found AS MATERIALIZED (
    SELECT * FROM looked
     WHERE ($9::timestamptz IS NULL OR created_at >= $9) AND ($10::timestamptz IS NULL OR created_at < $10)
       -- The payload alone, without the line of run options (formats J and B).
       AND ($11 IS NULL OR (coalesce(before, 0) < 33554432 AND position($11 IN CASE WHEN format IN ('J', 'B') THEN substring(payload FROM position('\x0a'::bytea IN payload) + 1) ELSE payload END) > 0))
     ORDER BY id DESC LIMIT $1
)
SELECT f.id, l.type, l.queue, l.priority, f.format::text AS format, f.payload, f.state, f.kind, f.attempts, f.max_attempts, f.created_at,
       f.run_at, f.ended_at, f.expires_at, e.edge
  FROM (SELECT CASE WHEN (SELECT count(*) FROM found) < $1 THEN
                    greatest((SELECT edge FROM bound),
                          (SELECT CASE WHEN max(upto) >= $13 THEN min(lo) END FROM seen),
                          (SELECT CASE WHEN bool_or(before >= 33554432) THEN min(id) FILTER (WHERE coalesce(before, 0) < 33554432) END FROM looked)) END AS edge) e
       LEFT JOIN (found f JOIN fastq.lane l ON l.id = f.lane) ON true
 ORDER BY f.id DESC
