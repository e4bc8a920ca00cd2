-- For the rest of the transaction: how long a statement may wait for a lock.
SELECT set_config('lock_timeout', $1::text, true)
