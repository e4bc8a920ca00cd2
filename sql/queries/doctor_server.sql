-- What the doctor asks the server of itself: versions, who we are, what we may see, and the settings on which durability and upkeep rest.
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::integer AS version_num,
       current_database() AS database, current_user AS role,
       (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS is_superuser,
       pg_has_role('pg_read_all_stats', 'USAGE') AS sees_all,
       pg_catalog.pg_is_in_recovery() AS is_standby,
       current_setting('default_transaction_read_only')::boolean AS is_read_only,
       current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit, current_setting('autovacuum') AS autovacuum
