-- As purge_dead.sql, with archived tasks: those of a queue ($4; NULL: all that are not named) that ended as $3 longer than $5 seconds ago go, and
-- where $6 says so, into the archive: at most $7 of them, or 8 MiB of payloads; only the leader ($1, term $2). Answers how many went, and whether
-- there may be more. Who deletes a row archives it, in the same statement: each once.
WITH rules AS MATERIALIZED (
    SELECT l.id AS lane, l.type, l.queue, l.priority, k.state, k.seconds, k.is_archived
      FROM fastq.lane l,
           LATERAL (SELECT DISTINCT ON (r.state) r.state, r.seconds, r.is_archived
                      FROM unnest($3::text[], $4::text[], $5::double precision[], $6::boolean[]) AS r (state, queue, seconds, is_archived)
                     WHERE r.queue IS NULL OR r.queue = l.queue ORDER BY r.state, r.queue NULLS LAST) k
     WHERE EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)
), picked AS MATERIALIZED (
    SELECT old.id, old.bytes
      FROM rules r, LATERAL (SELECT d.id, octet_length(d.payload) AS bytes FROM fastq.dead d
                              WHERE d.lane = r.lane AND d.state = r.state AND d.ended_at < statement_timestamp() - r.seconds * interval '1 second'
                              ORDER BY d.ended_at LIMIT $7::bigint FOR UPDATE SKIP LOCKED) old
     LIMIT $7
), weighed AS MATERIALIZED (
    SELECT id, (sum(bytes) OVER (ORDER BY id))::bigint - bytes AS before FROM picked
), gone AS MATERIALIZED (
    DELETE FROM fastq.dead WHERE id = ANY (ARRAY (SELECT id FROM weighed WHERE before < 8388608)) RETURNING *
), archived AS (
    INSERT INTO fastq.archive (id, type, queue, priority, state, attempts, max_attempts, created_at, ended_at, format, payload, error)
    SELECT g.id, r.type, r.queue, r.priority, g.state, g.attempts, g.max_attempts, g.created_at, g.ended_at,
           -- What a task said of its own runs (formats J and B) ends with it.
           CASE g.format WHEN 'J' THEN 'j' WHEN 'B' THEN 'b' ELSE g.format END,
           CASE WHEN g.format IN ('J', 'B') THEN substring(g.payload FROM position('\x0a'::bytea IN g.payload) + 1) ELSE g.payload END,
           (SELECT a.error FROM fastq.attempt_error a WHERE a.id = g.id ORDER BY a.failed_at DESC LIMIT 1)
      FROM gone g JOIN rules r ON r.lane = g.lane AND r.state = g.state WHERE r.is_archived
)
SELECT count(*) AS tasks, count(*) > 0 AND (count(*) = $7 OR count(*) < (SELECT count(*) FROM picked)) AS more FROM gone
