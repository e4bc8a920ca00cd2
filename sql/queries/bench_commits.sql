-- Transactions that were committed in this database; a backend reports its own about once a second.
SELECT xact_commit FROM pg_catalog.pg_stat_database WHERE datname = current_database()
