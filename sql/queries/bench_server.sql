-- What a benchmark says of the server: its version, who we are there, and the settings that its figures rest on.
SELECT current_setting('server_version') AS version,
       (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS is_superuser,
       current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit, current_setting('wal_level') AS wal_level,
       current_setting('wal_compression') AS wal_compression, current_setting('max_wal_size') AS max_wal_size,
       current_setting('checkpoint_timeout') AS checkpoint_timeout, current_setting('shared_buffers') AS shared_buffers
