-- insert_tokens.sql where some are not held for as long as their task is kept; sorted by the caller, too. Parameters and answer as in
-- enqueue_tx.sql, one element a token: $1 types, $2 tokens, $3 ids, $4 microseconds to hold it, or null, $5 whether only until the task
-- has ended. Answers the ids of those that were free.
WITH wanted AS MATERIALIZED (
    SELECT type, token, id, ttl, until_end, n
      FROM unnest($1::refcursor::text::bytea[], $2::refcursor::text::bytea[], $3::refcursor::text::bigint[], $4::refcursor::text::bigint[], $5::refcursor::text::boolean[])
           WITH ORDINALITY AS t (type, token, id, ttl, until_end, n)
), taken AS (
    INSERT INTO fastq.token (type, token, id, expires_at, until_end)
    SELECT convert_from(type, 'UTF8'), convert_from(token, 'UTF8'), id, clock_timestamp() + ttl * interval '1 microsecond', until_end FROM wanted ORDER BY n
    ON CONFLICT DO NOTHING RETURNING id
)
SELECT coalesce(array_agg(id), '{}')::text::refcursor FROM taken
