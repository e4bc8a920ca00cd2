-- Take up to $3 tasks and $4 payload bytes from at most $11 chunks of the lanes asked for, in their order: one round trip.
-- $1 is the consumer, $2 the last claim number it used. Lanes of one group share one limit (want); chunks bounds what is locked
-- in one lane. A row shrunk since the snapshot is locked as it is now, and removed by hi: by ctid it would be missed and run twice.
-- Whether a chunk expires is told, and when its tasks do is asked for only then (read_lefts.sql): here it would cost every claim.
-- OFFSET 0 keeps the look-up of content a nested loop; docs/adr/0001-storage.md has the plans it fell into without.
WITH locked AS MATERIALIZED (
    SELECT a.ord, a.grp, a.want, r.*
      FROM unnest($5::integer[], $6::smallint[], $7::bigint[], $8::integer[], $9::bigint[], $10::bigint[])
           WITH ORDINALITY AS a (lane, track, hint, grp, want, chunks, ord),
           LATERAL (SELECT q.rid, q.lo, q.hi, q.lane, q.track, q.leaf, q.attempts, q.max_attempts, q.task_bytes, q.expires_at
                      FROM fastq.ready q
                     WHERE q.lane = a.lane AND q.track = a.track AND q.rid >= a.hint
                     ORDER BY q.rid LIMIT a.chunks FOR NO KEY UPDATE SKIP LOCKED) r
     LIMIT $11::bigint
), grouped AS (
    SELECT *, (sum(hi - lo + 1) OVER (PARTITION BY grp ORDER BY ord, rid, hi))::bigint - (hi - lo + 1) AS skip FROM locked
), wanted AS (
    SELECT *, least(hi, lo + want - skip - 1) AS cut FROM grouped WHERE skip < want
), summed AS (
    SELECT *, (sum(cut - lo + 1) OVER w)::bigint - (cut - lo + 1) AS before,
           (sum((cut - lo + 1) * task_bytes) OVER w)::bigint - (cut - lo + 1) * task_bytes AS bytes_before
      FROM wanted WINDOW w AS (ORDER BY ord, rid, hi)
), take AS MATERIALIZED (
    SELECT *, least(cut, lo + $3::bigint - before - 1, lo + greatest(($4::bigint - bytes_before) / greatest(task_bytes, 1), 1) - 1) AS upto
      FROM summed WHERE before < $3 AND bytes_before < $4
), whole AS (
    DELETE FROM fastq.ready WHERE hi = ANY (ARRAY (SELECT hi FROM take WHERE upto = hi)) RETURNING hi
), part AS (
    UPDATE fastq.ready r SET lo = (SELECT t.upto + 1 FROM take t WHERE t.hi = r.hi)
     WHERE r.hi = ANY (ARRAY (SELECT hi FROM take WHERE upto < hi)) RETURNING r.hi
), taken AS MATERIALIZED (
    SELECT * FROM take WHERE hi IN (SELECT hi FROM whole UNION ALL SELECT hi FROM part)
), claims AS MATERIALIZED (
    SELECT $2::bigint + row_number() OVER () AS no, lane, track, leaf, attempts, max_attempts,
           max(task_bytes) AS task_bytes, min(expires_at) AS first_expires_at, range_agg(int8range(lo, upto, '[]')) AS ids
      FROM taken GROUP BY lane, track, leaf, attempts, max_attempts
), stored AS (
    INSERT INTO fastq.claim (consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, expires_at, ids)
    SELECT $1::bigint, no, lane, track, leaf, attempts, max_attempts, task_bytes, first_expires_at, ids FROM claims
)
SELECT k.no, k.lane, k.track, k.rid, k.leaf, k.attempts, k.max_attempts, k.lo, k.upto, k.upto < k.hi AS shrunk,
       p.ids, p.created_ats, p.formats, p.payloads,
       k.expires_at IS NOT NULL AS expires
  FROM (SELECT * FROM taken JOIN claims USING (lane, track, leaf, attempts, max_attempts) ORDER BY ord, rid, hi OFFSET 0) k,
       LATERAL (SELECT array_agg(t.id) AS ids, array_agg(t.created_at) AS created_ats, array_agg(t.format) AS formats, array_agg(t.payload) AS payloads
                  FROM (SELECT id, created_at, format, payload FROM fastq.task
                         WHERE task.leaf = k.leaf AND id BETWEEN k.lo AND k.upto ORDER BY id OFFSET 0) t) p
