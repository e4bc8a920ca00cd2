-- Lock tokens that somebody has, in the order of the caller, who sorted them: whose they are is decided by take_over_tokens.sql, a statement
-- of its own, since this one's snapshot is older than its locks. Parameters as in enqueue_tx.sql: $1 types, $2 tokens. Answers the ids.
SELECT coalesce(array_agg(t.id), '{}')::text::refcursor
  FROM (SELECT convert_from(type, 'UTF8') AS type, convert_from(token, 'UTF8') AS token
          FROM unnest($1::refcursor::text::bytea[], $2::refcursor::text::bytea[]) AS s (type, token) OFFSET 0) s,
       LATERAL (SELECT id FROM fastq.token WHERE token.type = s.type AND token.token = s.token OFFSET 0 FOR UPDATE) t
