-- Connections in use, and the limit, of the whole server (without those kept for superusers), of this role and of this database (-1: none).
SELECT (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL) AS used,
       current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
       - coalesce(current_setting('reserved_connections', true), '0')::integer AS most,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usesysid = r.oid) AS of_role, r.rolconnlimit AS most_of_role,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE datid = d.oid AND usesysid IS NOT NULL) AS of_database, d.datconnlimit AS most_of_database
  FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
 WHERE r.rolname = current_user AND d.datname = current_database()
