-- Up to $1 tasks in order of created_at and id, falling if $9, behind time $8 and id $2 (NULL: from the start), of lanes $3 (NULL: all),
-- of the kinds of pending in $4 (ready, scheduled, retrying), running if $5, completed if $6, of the ends in $7; with ids from $10 to
-- $11, created from $12 on and before $13 (NULL: whenever). Ids do not follow time and no index does (it would cost every enqueue), so
-- this looks at the time of each task of those states, and keeps $1.
WITH found AS (
    SELECT t.id, 'pending' AS state, NULL AS kind, r.lane, r.leaf, r.attempts, r.max_attempts, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at, t.created_at
      FROM fastq.ready r, LATERAL (SELECT id, created_at FROM fastq.task WHERE task.leaf = r.leaf AND id BETWEEN r.lo AND r.hi OFFSET 0) t
     WHERE ($3::integer[] IS NULL OR r.lane = ANY ($3)) AND 'ready' = ANY ($4::text[])
    UNION ALL
    SELECT d.id, 'pending', d.kind, d.lane, d.leaf, d.attempts, d.max_attempts, d.run_at, NULL, coalesce(d.created_at, t.created_at)
      FROM fastq.delayed d LEFT JOIN LATERAL (SELECT created_at FROM fastq.task WHERE task.leaf = d.leaf AND id = d.id OFFSET 0) t ON true
     WHERE ($3 IS NULL OR d.lane = ANY ($3)) AND d.kind = ANY ($4)
    UNION ALL
    SELECT t.id, 'running', NULL, c.lane, c.leaf, (c.attempts + 1)::smallint, c.max_attempts, NULL, NULL, t.created_at
      FROM fastq.claim c, unnest(c.ids) r,
           LATERAL (SELECT id, created_at FROM fastq.task WHERE task.leaf = c.leaf AND id >= lower(r) AND id < upper(r) OFFSET 0) t
     WHERE ($3 IS NULL OR c.lane = ANY ($3)) AND $5::boolean
    UNION ALL
    SELECT t.id, 'completed', NULL, d.lane, d.leaf, d.attempts, NULL, NULL, d.done_at, t.created_at
      FROM fastq.done d, unnest(d.ids) r,
           LATERAL (SELECT id, created_at FROM fastq.task WHERE task.leaf = d.leaf AND id >= lower(r) AND id < upper(r) OFFSET 0) t
     WHERE ($3 IS NULL OR d.lane = ANY ($3)) AND $6::boolean
    UNION ALL
    SELECT id, state, NULL, lane, NULL, attempts, max_attempts, NULL, ended_at, created_at FROM fastq.dead
     WHERE ($3 IS NULL OR lane = ANY ($3)) AND state = ANY ($7::text[])
), page AS MATERIALIZED (
    SELECT * FROM found
     WHERE ($8::timestamptz IS NULL OR CASE WHEN $9::boolean THEN (created_at, id) < ($8, $2::bigint) ELSE (created_at, id) > ($8, $2) END)
       AND id BETWEEN $10::bigint AND $11::bigint
       AND ($12::timestamptz IS NULL OR created_at >= $12) AND ($13::timestamptz IS NULL OR created_at < $13)
     ORDER BY CASE WHEN $9 THEN created_at END DESC, CASE WHEN $9 THEN id END DESC, created_at, id LIMIT $1::bigint
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
 ORDER BY CASE WHEN $9 THEN f.created_at END DESC, CASE WHEN $9 THEN f.id END DESC, f.created_at, f.id
