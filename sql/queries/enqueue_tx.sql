-- Tasks in somebody else's transaction, on a connection that is not ours: tokens, content, chunks and tasks for later in one statement,
-- so that an interruption leaves nothing half written. Each parameter, and the answer, is an array as text, bytes in hexadecimal:
-- what the connection's adapters, codecs and encoding do to numbers, times, texts and bytes then doesn't matter. It is declared a
-- refcursor, a text by another name, which nobody has a codec for. $1 the leaf; one element a token, sorted: $2 types, $3 tokens,
-- $4 ids; one a task: $5 ids, $6 lanes, $7 max_attempts, $8 formats, $9 payloads; one a chunk: $10 lanes, $11 max_attempts,
-- $12 task_bytes, $13 lo, $14 hi (a task with a token is a chunk by itself); one a task for later: $15 ids, $16 lanes,
-- $17 max_attempts, $18 formats, $19 payloads, $20 seconds from now, or $21 the time itself in microseconds since 1970. When they expire, in
-- microseconds since 1970: $22 tasks, $23 the first of each chunk, $24 tasks for later; empty where none does. A task whose
-- token is somebody else's is not written; answers the ids whose token was free.
WITH wanted AS MATERIALIZED (
    SELECT type, token, id, n FROM unnest($2::refcursor::text::bytea[], $3::refcursor::text::bytea[], $4::refcursor::text::bigint[]) WITH ORDINALITY AS t (type, token, id, n)
), taken AS (
    INSERT INTO fastq.token (type, token, id)
    SELECT convert_from(type, 'UTF8'), convert_from(token, 'UTF8'), id FROM wanted ORDER BY n
    ON CONFLICT DO NOTHING RETURNING id
), held AS MATERIALIZED (
    SELECT id FROM wanted EXCEPT SELECT id FROM taken
), content AS (
    INSERT INTO fastq.task (id, lane, leaf, max_attempts, format, payload, expires_at)
    SELECT id, lane, ($1::refcursor::text::smallint[])[1], max_attempts, format, payload,
           'epoch'::timestamptz + over / 3600000000 * interval '1 hour' + over % 3600000000 * interval '1 microsecond'
      FROM unnest($5::refcursor::text::bigint[], $6::refcursor::text::integer[], $7::refcursor::text::smallint[], $8::refcursor::text::"char"[], $9::refcursor::text::bytea[], $22::refcursor::text::bigint[])
           AS t (id, lane, max_attempts, format, payload, over)
     WHERE id <> ALL (ARRAY (SELECT id FROM held))
), chunks AS (
    INSERT INTO fastq.ready (lane, leaf, max_attempts, task_bytes, lo, hi, expires_at)
    SELECT lane, ($1::refcursor::text::smallint[])[1], max_attempts, task_bytes, lo, hi,
           'epoch'::timestamptz + over / 3600000000 * interval '1 hour' + over % 3600000000 * interval '1 microsecond'
      FROM unnest($10::refcursor::text::integer[], $11::refcursor::text::smallint[], $12::refcursor::text::integer[], $13::refcursor::text::bigint[], $14::refcursor::text::bigint[], $23::refcursor::text::bigint[])
           AS c (lane, max_attempts, task_bytes, lo, hi, over)
     WHERE hi <> ALL (ARRAY (SELECT id FROM held))
), later AS (
    INSERT INTO fastq.delayed (id, lane, max_attempts, format, payload, task_bytes, created_at, kind, run_at, expires_at)
    SELECT id, lane, max_attempts, format, payload, octet_length(payload), clock_timestamp(), 'scheduled',
           coalesce('epoch'::timestamptz + us / 3600000000 * interval '1 hour' + us % 3600000000 * interval '1 microsecond',
                    clock_timestamp() + delay * interval '1 second'),
           'epoch'::timestamptz + over / 3600000000 * interval '1 hour' + over % 3600000000 * interval '1 microsecond'
      FROM unnest($15::refcursor::text::bigint[], $16::refcursor::text::integer[], $17::refcursor::text::smallint[], $18::refcursor::text::"char"[], $19::refcursor::text::bytea[], $20::refcursor::text::double precision[], $21::refcursor::text::bigint[], $24::refcursor::text::bigint[])
           AS d (id, lane, max_attempts, format, payload, delay, us, over)
     WHERE id <> ALL (ARRAY (SELECT id FROM held))
)
SELECT coalesce(array_agg(id), '{}')::text::refcursor FROM taken
