-- Let this session's transaction last, whatever limits the role or the database sets. Those that this server does not know are left out.
SELECT name, set_config(name, '0', false) FROM pg_catalog.pg_settings
 WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout', 'statement_timeout', 'idle_session_timeout')
