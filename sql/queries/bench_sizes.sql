-- What the tables of schema $1 take, in bytes with their indexes and long values: contents, completions, the archive, and all others.
SELECT coalesce(sum(n) FILTER (WHERE name LIKE 'task\_%'), 0)::bigint AS contents,
       coalesce(sum(n) FILTER (WHERE name LIKE 'done\_%'), 0)::bigint AS completions,
       coalesce(sum(n) FILTER (WHERE name = 'archive'), 0)::bigint AS archive,
       coalesce(sum(n) FILTER (WHERE name NOT LIKE 'task\_%' AND name NOT LIKE 'done\_%' AND name <> 'archive'), 0)::bigint AS others
  FROM (SELECT c.relname AS name, pg_total_relation_size(c.oid) AS n
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace
         WHERE s.nspname = $1::text AND c.relkind = 'r') t
