-- The backends of the sessions that are named $1, and what each ran last.
SELECT pid, query FROM pg_catalog.pg_stat_activity WHERE application_name = $1::text AND backend_type = 'client backend'
