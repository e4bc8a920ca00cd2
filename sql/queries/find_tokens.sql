-- Who holds these tokens? A statement of its own: the insert that met them does not see what committed while it waited.
SELECT s.n, t.id FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (type, token, n), LATERAL (SELECT id FROM fastq.token WHERE token.type = s.type AND token.token = s.token OFFSET 0) t
