-- Wake the consumers with the commit of somebody else's transaction: channel $1, lanes $2 as text. Unlike notify_ready.sql it leaves
-- that transaction's durability alone. Parameters and answer as in enqueue_tx.sql.
SELECT ARRAY (SELECT 1 FROM pg_notify(convert_from(($1::refcursor::text::bytea[])[1], 'UTF8'), convert_from(($2::refcursor::text::bytea[])[1], 'UTF8')))::text::refcursor
