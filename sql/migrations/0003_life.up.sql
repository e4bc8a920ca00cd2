-- fastq, schema step 3: the whole life of a task.
-- oldest fastq: 0.1.0

-- Up to which of its claims the last beat says what runs: a later one may hold a task that ran before. NULL: an older version's.
ALTER TABLE fastq.consumer ADD COLUMN last_no bigint;

-- What a handler returned, where its type keeps results: written with the completion, once, for those who wait for it.
CREATE TABLE fastq.result (
    id         bigint PRIMARY KEY,             -- of the task
    expires_at timestamptz NOT NULL,           -- nobody is shown it from then on; the leader removes it soon after
    format     "char" NOT NULL,                -- j: JSON in UTF-8, b: raw bytes
    value      bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX result_expires_at ON fastq.result (expires_at);

-- Where it is so set, what retention removes goes here: one row a task, written in the statement that takes it out of `done` or `dead`. fastq
-- only ever inserts, by these columns' names, and never reads: it may be drained, or another table, partitioned or not, put in its place.
CREATE TABLE fastq.archive (
    id           bigint NOT NULL,
    type         text COLLATE "C" NOT NULL,
    queue        text COLLATE "C" NOT NULL,
    priority     smallint NOT NULL,
    state        text NOT NULL,                -- completed, failed, cancelled or expired
    attempts     smallint NOT NULL,
    max_attempts smallint NOT NULL,
    created_at   timestamptz NOT NULL,
    ended_at     timestamptz NOT NULL,
    format       "char" NOT NULL,              -- j: JSON in UTF-8, b: raw bytes
    payload      bytea NOT NULL,
    error        text                          -- of its last failed attempt; NULL: none failed
);
CREATE INDEX archive_id ON fastq.archive (id);

-- How long a token is held, where that is not for as long as its task is kept; NULL in both, and in rows of older producers: so long. What is
-- unique in a queue or everywhere has an empty type, which no task has, and a token of `<bytes of the queue's name>:<queue>:<token>` or
-- `:<token>`. No default: the columns cost no rewrite, and nothing in a row that doesn't use them.
ALTER TABLE fastq.token
    ADD COLUMN expires_at timestamptz,         -- from then on a new task may have it
    ADD COLUMN until_end  boolean;             -- so it may as soon as its task has ended, however

-- When a task expires is known where it waits: in chunks (the earliest of theirs) and in `delayed`. A claim remembers it, so that what is given
-- back, rescued, put off or retried keeps it; NULL: none of its tasks expires. Older workers do not know it: they run a task past its time, and
-- what goes back into a chunk or waits for a retry by them has lost it.
ALTER TABLE fastq.claim ADD COLUMN expires_at timestamptz;

-- Tasks with a timeout or a retry policy of their own carry them before their payload, in one line of JSON, as formats J (JSON) and B (raw bytes):
-- a column would cost every task 8 bytes. Older workers do not know these formats. The view shows the payload alone, as ever.
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
       CASE f.format WHEN 'j' THEN convert_from(f.payload, 'UTF8')
                     WHEN 'J' THEN convert_from(substring(f.payload FROM position('\x0a'::bytea IN f.payload) + 1), 'UTF8')
                     WHEN 'B' THEN encode(substring(f.payload FROM position('\x0a'::bytea IN f.payload) + 1), 'hex')
                     ELSE encode(f.payload, 'hex') END AS payload
  FROM found f JOIN fastq.lane l ON l.id = f.lane;
