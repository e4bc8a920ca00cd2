-- The server's processes: the backends of the sessions that are named $1, and those that serve nobody (log writer, checkpointer ...).
SELECT pid, usesysid IS NOT NULL AS is_backend FROM pg_catalog.pg_stat_activity
 WHERE usesysid IS NULL OR application_name = $1::text
