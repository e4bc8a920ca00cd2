-- Give new tasks those of the tokens that hold_tokens.sql locked whose time is over, or whose task has ended and which are held until then.
-- A task that is in none of the places of the living has ended: it moves between any two of them in one transaction, and this statement
-- sees one moment. Parameters and answers as in enqueue_tx.sql, as for take_tokens.sql. Answers the places (from 1) of the tokens that are
-- there, and as long a list of their holders, 0 for those that were taken over.
WITH wanted AS MATERIALIZED (
    SELECT convert_from(type, 'UTF8') AS type, convert_from(token, 'UTF8') AS token, id, ttl, until_end, n
      FROM unnest($1::refcursor::text::bytea[], $2::refcursor::text::bytea[], $3::refcursor::text::bigint[], $4::refcursor::text::bigint[], $5::refcursor::text::boolean[])
           WITH ORDINALITY AS t (type, token, id, ttl, until_end, n)
), running AS MATERIALIZED (
    SELECT coalesce(range_agg(i), '{}') AS ids FROM fastq.claim c, unnest(c.ids) i
), held AS MATERIALIZED (
    SELECT w.n, t.id,
           coalesce(t.expires_at <= clock_timestamp(), false)
           OR (coalesce(t.until_end, false)
               AND NOT EXISTS (SELECT FROM (SELECT lo FROM fastq.ready WHERE hi >= t.id ORDER BY hi LIMIT 1) r WHERE r.lo <= t.id)
               AND NOT EXISTS (SELECT FROM fastq.delayed d WHERE d.id = t.id OFFSET 0)
               AND NOT (SELECT ids FROM running) @> t.id) AS is_free
      FROM wanted w, LATERAL (SELECT id, expires_at, until_end FROM fastq.token k WHERE k.type = w.type AND k.token = w.token OFFSET 0) t
), taken AS (
    UPDATE fastq.token k
       SET id = w.id, created_at = statement_timestamp(), expires_at = clock_timestamp() + w.ttl * interval '1 microsecond', until_end = w.until_end
      FROM wanted w JOIN held h USING (n)
     WHERE h.is_free AND k.type = w.type AND k.token = w.token AND k.id = ANY (ARRAY (SELECT id FROM held WHERE is_free))
)
SELECT coalesce(array_agg(n), '{}')::text::refcursor, coalesce(array_agg(CASE WHEN is_free THEN 0 ELSE id END), '{}')::text::refcursor FROM held
