-- Wake the consumers that listen: channel $1, the lanes as text $2. In a transaction of its own that does not wait for the log.
SELECT pg_notify($1::text, $2::text) WHERE set_config('synchronous_commit', 'off', true) = 'off'
