-- Our own backend, and for how many seconds it has been there: tells whether the same process is seen on this machine.
SELECT pid, extract(epoch FROM clock_timestamp() - backend_start)::double precision AS age
  FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()
