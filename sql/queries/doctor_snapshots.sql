-- Who keeps dead rows of this database from being removed, the worst first: sessions, prepared transactions, replication slots and standbys,
-- for longer than $1 seconds, or for more than $2 transactions where the time is not to be had (other users' sessions are hidden from roles
-- without pg_read_all_stats, but for their name and what they hold).
WITH holders AS (
    SELECT CASE WHEN backend_type = 'walsender' THEN 'standby' ELSE 'session' END AS kind, pid::text AS name, usename::text AS owner,
           nullif(application_name, '') AS application, coalesce(client_hostname, host(client_addr)) AS host, state,
           greatest(age(backend_xmin), age(backend_xid)) AS transactions, clock_timestamp() - xact_start AS held
      FROM pg_catalog.pg_stat_activity
     WHERE (datname = current_database() OR datname IS NULL) AND usesysid IS NOT NULL AND pid <> pg_backend_pid()
       AND backend_type IS DISTINCT FROM 'parallel worker' AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    UNION ALL
    SELECT 'prepared', gid, owner::text, NULL, NULL, NULL, age(transaction), clock_timestamp() - prepared
      FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()
    UNION ALL
    SELECT 'slot', slot_name::text, NULL, NULL, NULL, CASE WHEN active THEN 'active' ELSE 'inactive' END, age(xmin), NULL
      FROM pg_catalog.pg_replication_slots WHERE xmin IS NOT NULL
)
SELECT kind, name, owner, application, host, state, transactions, extract(epoch FROM held)::double precision AS seconds
  FROM holders WHERE coalesce(extract(epoch FROM held) > $1::double precision, transactions > $2::integer)
 ORDER BY transactions DESC NULLS LAST
