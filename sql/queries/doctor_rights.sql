-- Which of the rights in $2, $3, $4 and $5 (as for check_rights) does this role have in schema $1? In their order.
SELECT coalesce(CASE WHEN n.kind = 'schema' THEN has_schema_privilege(s.oid, n.privilege)
                     WHEN n.kind = 'sequence' THEN has_sequence_privilege(c.oid, n.privilege)
                     WHEN n.part <> '' THEN has_column_privilege(c.oid, n.part, n.privilege)
                     ELSE has_table_privilege(c.oid, n.privilege) END, false) AS has
  FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY AS n (kind, name, privilege, part, n)
       JOIN pg_catalog.pg_namespace s ON s.nspname = $1::text
       LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = s.oid AND c.relname = n.name
 ORDER BY n.n
