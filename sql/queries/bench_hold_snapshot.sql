-- The first statement of a repeatable-read transaction takes the snapshot that it keeps to its end.
SELECT pg_catalog.pg_backend_pid(), current_setting('transaction_isolation')
