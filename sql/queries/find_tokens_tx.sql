-- Who holds these tokens, asked in somebody else's transaction? Parameters and answers as in enqueue_tx.sql: $1 types, $2 tokens; answers
-- their places (from 1), as long a list of the holders' ids, and one of whether somebody else may have it by now, 0 or 1.
SELECT coalesce(array_agg(s.n), '{}')::text::refcursor, coalesce(array_agg(t.id), '{}')::text::refcursor, coalesce(array_agg(t.may_go), '{}')::text::refcursor
  FROM (SELECT convert_from(type, 'UTF8') AS type, convert_from(token, 'UTF8') AS token, n
          FROM unnest($1::refcursor::text::bytea[], $2::refcursor::text::bytea[]) WITH ORDINALITY AS s (type, token, n) OFFSET 0) s,
       LATERAL (SELECT id, (coalesce(until_end, false) OR coalesce(expires_at <= clock_timestamp(), false))::integer AS may_go
                  FROM fastq.token WHERE token.type = s.type AND token.token = s.token OFFSET 0) t
