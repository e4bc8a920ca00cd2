-- Who asks, who owns schema $1 (NULL: it is not there), and whether who asks may do what the owner may.
SELECT current_user::text AS role, pg_get_userbyid(n.nspowner)::text AS owner, pg_has_role(n.nspowner, 'USAGE') AS is_owner
  FROM (SELECT) one LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = $1::text
