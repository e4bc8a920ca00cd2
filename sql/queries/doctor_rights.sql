-- Rights that workers and producers need and that this role lacks, in schema $1: which, on what. Leaves are read and written through
-- their parents, locked and emptied by themselves. The sequence of an identity column needs no rights of its own.
WITH missing AS (
    SELECT 'USAGE' AS privilege, 'schema ' || nspname AS object FROM pg_catalog.pg_namespace
     WHERE nspname = $1::text AND NOT has_schema_privilege(oid, 'USAGE')
    UNION ALL
    SELECT p.privilege, c.relname
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           CROSS JOIN unnest(CASE WHEN c.relkind = 'S' THEN ARRAY['USAGE'] WHEN c.relkind = 'v' OR c.relname = 'migration' THEN ARRAY['SELECT']
                                  WHEN c.relispartition THEN ARRAY['SELECT', 'TRUNCATE'] WHEN c.relkind = 'p' THEN ARRAY['SELECT', 'INSERT']
                                  ELSE ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE'] END) AS p (privilege)
     WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'S', 'v')
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE classid = 'pg_catalog.pg_class'::regclass AND objid = c.oid AND deptype = 'i' AND c.relkind = 'S')
       AND NOT CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, p.privilege) ELSE has_table_privilege(c.oid, p.privilege) END
)
SELECT string_agg(privilege, ', ' ORDER BY privilege) AS privileges, object
  FROM missing GROUP BY object ORDER BY object NOT LIKE 'schema %', object
