-- Is there a schema of name $1?
SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1::text)
