-- Complete a task in the transaction of its handler, on a connection that is not ours. $1: the consumer, the number of the claim that holds
-- this task alone, and its run time in microseconds. The parameter and the answers are arrays as text: see enqueue_tx.sql.
-- Answers that number where the claim was there: else the run has lost it, and nothing is written. And which server and database this is,
-- as find_home.sql does: in another one there is no such claim. Under somebody's lock (a cancel, a rescue) it waits for them to decide.
WITH ended AS (
    DELETE FROM fastq.claim
     WHERE consumer = ($1::refcursor::text::bigint[])[1] AND no = ($1::refcursor::text::bigint[])[2]
    RETURNING consumer, no, lane, leaf, attempts, ids
), kept AS (
    INSERT INTO fastq.done (lane, leaf, lo, ids, consumer, no, attempts, took_us)
    SELECT lane, leaf, lower(ids), ids, consumer, no, attempts + 1, ($1::refcursor::text::bigint[])[3] FROM ended
)
SELECT (SELECT coalesce(array_agg(no), '{}') FROM ended)::text::refcursor,
       ARRAY[(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
             (SELECT oid FROM pg_database WHERE datname = current_database())::bigint]::text::refcursor
