-- Undo step 3: what a deletion looks tokens up by, what retention finds the dead by, the results that were kept, and the archive.
DROP INDEX IF EXISTS fastq.token_id, fastq.dead_lane_ended_at;
DROP TABLE fastq.result;
DROP TABLE fastq.archive;

-- And how long a token is held: all are held while their task is kept again.
ALTER TABLE fastq.token DROP COLUMN expires_at, DROP COLUMN until_end;

-- Beats name ids alone again.
ALTER TABLE fastq.consumer DROP COLUMN last_no;

-- And when claimed tasks expire, and what looked for those that did.
DROP INDEX IF EXISTS fastq.delayed_expires_at, fastq.ready_expires_at;
ALTER TABLE fastq.claim DROP COLUMN expires_at;

-- The view knows no run options again: of tasks that have some it shows the bytes.
CREATE OR REPLACE VIEW fastq.tasks AS
WITH found AS (
    SELECT t.id, t.lane, 'pending'::text AS state, NULL::text AS kind, r.attempts, t.max_attempts, t.created_at, NULL::timestamptz AS run_at, NULL::timestamptz AS ended_at, t.format, t.payload
      FROM fastq.ready r, LATERAL (SELECT * FROM fastq.task WHERE task.leaf = r.leaf AND task.id >= r.lo AND task.id <= r.hi OFFSET 0) t
    UNION ALL
    SELECT d.id, d.lane, 'pending', d.kind, d.attempts, d.max_attempts, coalesce(d.created_at, t.created_at), d.run_at, NULL, coalesce(d.format, t.format), coalesce(d.payload, t.payload)
      FROM fastq.delayed d LEFT JOIN LATERAL (SELECT * FROM fastq.task WHERE task.leaf = d.leaf AND task.id = d.id OFFSET 0) t ON true
    UNION ALL
    SELECT t.id, t.lane, 'running', NULL, (c.attempts + 1)::smallint, t.max_attempts, t.created_at, NULL, NULL, t.format, t.payload
      FROM fastq.claim c, unnest(c.ids) i, LATERAL (SELECT * FROM fastq.task WHERE task.leaf = c.leaf AND task.id >= lower(i) AND task.id < upper(i) OFFSET 0) t
    UNION ALL
    SELECT t.id, t.lane, 'completed', NULL, d.attempts, t.max_attempts, t.created_at, NULL, d.done_at, t.format, t.payload
      FROM fastq.done d, unnest(d.ids) i, LATERAL (SELECT * FROM fastq.task WHERE task.leaf = d.leaf AND task.id >= lower(i) AND task.id < upper(i) OFFSET 0) t
    UNION ALL
    SELECT d.id, d.lane, d.state, NULL, d.attempts, d.max_attempts, d.created_at, NULL, d.ended_at, d.format, d.payload FROM fastq.dead d
)
SELECT f.id, l.type, l.queue, l.priority, f.state, f.kind, f.attempts, f.max_attempts, f.created_at, f.run_at, f.ended_at,
       CASE f.format WHEN 'j' THEN convert_from(f.payload, 'UTF8') ELSE encode(f.payload, 'hex') END AS payload
  FROM found f JOIN fastq.lane l ON l.id = f.lane;
