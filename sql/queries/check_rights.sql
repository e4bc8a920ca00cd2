-- Of the rights in $2 (on what: schema, table or sequence), $3 (its name), $4 (which) and $5 (of which column, or empty) those that this role
-- lacks in schema $1, as text; and who it is. Leaves that lack the same are told as one. Reads the catalog alone, which needs no right.
WITH needed AS (
    SELECT n.*, s.oid AS schema_oid, c.oid
      FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY AS n (kind, name, privilege, part, n)
           JOIN pg_catalog.pg_namespace s ON s.nspname = $1::text
           LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = s.oid AND c.relname = n.name
), lacking AS (
    SELECT kind, name, privilege || coalesce(' (' || nullif(part, '') || ')', '') AS privilege, n FROM needed
     WHERE NOT CASE WHEN kind = 'schema' THEN has_schema_privilege(schema_oid, privilege)
                    WHEN oid IS NULL THEN true
                    WHEN kind = 'sequence' THEN has_sequence_privilege(oid, privilege)
                    WHEN part <> '' THEN has_column_privilege(oid, part, privilege)
                    ELSE has_table_privilege(oid, privilege) END
), objects AS (
    SELECT kind, name, string_agg(privilege, ', ' ORDER BY n) AS privileges, min(n) AS n FROM lacking GROUP BY kind, name
), told AS (
    SELECT privileges || ' on ' || CASE min(kind) WHEN 'schema' THEN 'schema ' || $1 ELSE min(name) END
           || CASE count(*) WHEN 1 THEN '' ELSE format(' and %s more leaves', count(*) - 1) END AS words, min(n) AS n
      FROM objects GROUP BY privileges, CASE WHEN name ~ '_\d\d$' THEN left(name, -2) ELSE name END
)
SELECT current_user::text AS role, string_agg(words, '; ' ORDER BY n) AS lacking FROM told
