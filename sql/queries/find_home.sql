-- Which server and database is this? Two connections that are open at the same time and answer alike are in the same database.
-- The answer as in enqueue_tx.sql.
SELECT ARRAY[(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
             (SELECT oid FROM pg_database WHERE datname = current_database())::bigint]::text::refcursor
