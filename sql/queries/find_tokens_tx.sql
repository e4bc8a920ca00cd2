-- Who holds these tokens, asked in somebody else's transaction? Parameters and answers as in enqueue_tx.sql: $1 types, $2 tokens; answers
-- their places (from 1), and as long a list of the holders' ids.
SELECT coalesce(array_agg(s.n), '{}')::text::refcursor, coalesce(array_agg(t.id), '{}')::text::refcursor
  FROM (SELECT convert_from(type, 'UTF8') AS type, convert_from(token, 'UTF8') AS token, n
          FROM unnest($1::refcursor::text::bytea[], $2::refcursor::text::bytea[]) WITH ORDINALITY AS s (type, token, n) OFFSET 0) s,
       LATERAL (SELECT id FROM fastq.token WHERE token.type = s.type AND token.token = s.token OFFSET 0) t
