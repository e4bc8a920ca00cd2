-- Where the snapshot of backend $1 stands, and how many transactions have come since.
SELECT backend_xmin::text::bigint, age(backend_xmin) FROM pg_catalog.pg_stat_activity WHERE pid = $1::integer
