-- Change those of the tasks that wait for a time, as edit_delayed.sql does, each in its own way: what a later task of the same token brings.
-- Parameters and answer as in enqueue_tx.sql, one element a task: $1 ids, $2 formats and $3 payloads, or null, $4 seconds from now or $5
-- microseconds since 1970, or null. Answers their ids.
WITH wanted AS MATERIALIZED (
    SELECT id, format, payload,
           coalesce('epoch'::timestamptz + us / 3600000000 * interval '1 hour' + us % 3600000000 * interval '1 microsecond',
                    clock_timestamp() + delay * interval '1 second') AS run_at
      FROM unnest($1::refcursor::text::bigint[], $2::refcursor::text::"char"[], $3::refcursor::text::bytea[], $4::refcursor::text::double precision[], $5::refcursor::text::bigint[])
           AS t (id, format, payload, delay, us)
), locked AS MATERIALIZED (
    SELECT id, leaf FROM fastq.delayed WHERE id = ANY (ARRAY (SELECT id FROM wanted)) ORDER BY id FOR UPDATE
), content AS (
    UPDATE fastq.task t SET format = w.format, payload = w.payload
      FROM wanted w JOIN locked l USING (id)
     WHERE t.id = w.id AND t.leaf = l.leaf AND w.payload IS NOT NULL
       AND t.id = ANY (ARRAY (SELECT id FROM locked)) AND t.leaf = ANY (ARRAY (SELECT leaf FROM locked))
), changed AS (
    UPDATE fastq.delayed d
       SET run_at = coalesce(w.run_at, d.run_at),
           kind = CASE WHEN w.run_at IS NULL THEN d.kind ELSE 'scheduled' END,
           format = CASE WHEN d.leaf IS NULL THEN coalesce(w.format, d.format) END,
           payload = CASE WHEN d.leaf IS NULL THEN coalesce(w.payload, d.payload) END,
           task_bytes = coalesce(octet_length(w.payload), d.task_bytes)
      FROM wanted w WHERE d.id = w.id AND d.id = ANY (ARRAY (SELECT id FROM locked)) RETURNING d.id
)
SELECT coalesce(array_agg(id), '{}')::text::refcursor FROM changed
