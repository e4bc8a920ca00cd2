-- Who holds these tokens, and may somebody else have it by now (take_over_tokens.sql finds out)? A statement of its own: the insert that met
-- them does not see what committed while it waited.
SELECT s.n, t.id, t.may_go FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (type, token, n),
       LATERAL (SELECT id, coalesce(until_end, false) OR coalesce(expires_at <= statement_timestamp(), false) AS may_go
                  FROM fastq.token WHERE token.type = s.type AND token.token = s.token OFFSET 0) t
