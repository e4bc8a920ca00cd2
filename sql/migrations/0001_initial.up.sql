-- fastq, schema step 1: tables in which a task's state is the table that holds its id.
-- oldest fastq: 0.1.0
--
-- The words `fastq.` stand for the schema (a setting) and are replaced by its quoted name before the text is run.
-- No foreign keys, no triggers, no row that is updated as a shared counter: see docs/adr/0001-storage.md.

-- Ids are handed out in blocks of 1,000: a producer reserves a block and numbers its tasks itself.
CREATE SEQUENCE fastq.task_id INCREMENT BY 1000;
-- Order of chunks within a lane. CACHE 1, so that a later insert never gets a lower number than an earlier commit needs.
CREATE SEQUENCE fastq.rid;

-- A lane is what a claim can ask for apart: one queue, type and priority.
CREATE TABLE fastq.lane (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue      text COLLATE "C" NOT NULL,
    type       text COLLATE "C" NOT NULL,
    priority   smallint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (queue, type, priority)
);

-- The ring of leaves: one is open (new tasks go there), closed ones are emptied whole at the end of retention.
CREATE TABLE fastq.leaf (
    no        smallint PRIMARY KEY,
    state     text NOT NULL CHECK (state IN ('empty', 'open', 'closed')),
    opened_at timestamptz,
    closed_at timestamptz
);
INSERT INTO fastq.leaf SELECT g, CASE g WHEN 0 THEN 'open' ELSE 'empty' END, CASE g WHEN 0 THEN clock_timestamp() END FROM generate_series(0, 15) g;

-- A task's content, written once. created_at is STABLE by default (not clock_timestamp()): COPY writes
-- many rows a WAL record only when no default is volatile.
CREATE TABLE fastq.task (
    id           bigint NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT statement_timestamp(),
    lane         integer NOT NULL,
    leaf         smallint NOT NULL,
    max_attempts smallint NOT NULL,
    format       "char" NOT NULL,          -- j: JSON in UTF-8, b: raw bytes
    payload      bytea NOT NULL,
    expires_at   timestamptz
) PARTITION BY LIST (leaf);

-- What one flush completed of one claim. ids spans less than 1,024, so a look-up by lo finds it.
CREATE TABLE fastq.done (
    lo       bigint NOT NULL,
    consumer bigint NOT NULL,
    no       bigint NOT NULL,
    done_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    took_us  bigint NOT NULL,              -- run time of all of them together, microseconds
    lane     integer NOT NULL,             -- a claim has one: counts by queue and type need no look at the tasks
    leaf     smallint NOT NULL,            -- of the tasks: both leaves are emptied together
    attempts smallint NOT NULL,            -- runs, the last one too
    ids      int8multirange NOT NULL
) PARTITION BY LIST (leaf);

CREATE TABLE fastq.task_00 PARTITION OF fastq.task FOR VALUES IN (0) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_00_id ON fastq.task_00 (id);
CREATE TABLE fastq.done_00 PARTITION OF fastq.done FOR VALUES IN (0);
CREATE INDEX done_00_lo ON fastq.done_00 (lo);

CREATE TABLE fastq.task_01 PARTITION OF fastq.task FOR VALUES IN (1) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_01_id ON fastq.task_01 (id);
CREATE TABLE fastq.done_01 PARTITION OF fastq.done FOR VALUES IN (1);
CREATE INDEX done_01_lo ON fastq.done_01 (lo);

CREATE TABLE fastq.task_02 PARTITION OF fastq.task FOR VALUES IN (2) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_02_id ON fastq.task_02 (id);
CREATE TABLE fastq.done_02 PARTITION OF fastq.done FOR VALUES IN (2);
CREATE INDEX done_02_lo ON fastq.done_02 (lo);

CREATE TABLE fastq.task_03 PARTITION OF fastq.task FOR VALUES IN (3) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_03_id ON fastq.task_03 (id);
CREATE TABLE fastq.done_03 PARTITION OF fastq.done FOR VALUES IN (3);
CREATE INDEX done_03_lo ON fastq.done_03 (lo);

CREATE TABLE fastq.task_04 PARTITION OF fastq.task FOR VALUES IN (4) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_04_id ON fastq.task_04 (id);
CREATE TABLE fastq.done_04 PARTITION OF fastq.done FOR VALUES IN (4);
CREATE INDEX done_04_lo ON fastq.done_04 (lo);

CREATE TABLE fastq.task_05 PARTITION OF fastq.task FOR VALUES IN (5) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_05_id ON fastq.task_05 (id);
CREATE TABLE fastq.done_05 PARTITION OF fastq.done FOR VALUES IN (5);
CREATE INDEX done_05_lo ON fastq.done_05 (lo);

CREATE TABLE fastq.task_06 PARTITION OF fastq.task FOR VALUES IN (6) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_06_id ON fastq.task_06 (id);
CREATE TABLE fastq.done_06 PARTITION OF fastq.done FOR VALUES IN (6);
CREATE INDEX done_06_lo ON fastq.done_06 (lo);

CREATE TABLE fastq.task_07 PARTITION OF fastq.task FOR VALUES IN (7) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_07_id ON fastq.task_07 (id);
CREATE TABLE fastq.done_07 PARTITION OF fastq.done FOR VALUES IN (7);
CREATE INDEX done_07_lo ON fastq.done_07 (lo);

CREATE TABLE fastq.task_08 PARTITION OF fastq.task FOR VALUES IN (8) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_08_id ON fastq.task_08 (id);
CREATE TABLE fastq.done_08 PARTITION OF fastq.done FOR VALUES IN (8);
CREATE INDEX done_08_lo ON fastq.done_08 (lo);

CREATE TABLE fastq.task_09 PARTITION OF fastq.task FOR VALUES IN (9) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_09_id ON fastq.task_09 (id);
CREATE TABLE fastq.done_09 PARTITION OF fastq.done FOR VALUES IN (9);
CREATE INDEX done_09_lo ON fastq.done_09 (lo);

CREATE TABLE fastq.task_10 PARTITION OF fastq.task FOR VALUES IN (10) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_10_id ON fastq.task_10 (id);
CREATE TABLE fastq.done_10 PARTITION OF fastq.done FOR VALUES IN (10);
CREATE INDEX done_10_lo ON fastq.done_10 (lo);

CREATE TABLE fastq.task_11 PARTITION OF fastq.task FOR VALUES IN (11) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_11_id ON fastq.task_11 (id);
CREATE TABLE fastq.done_11 PARTITION OF fastq.done FOR VALUES IN (11);
CREATE INDEX done_11_lo ON fastq.done_11 (lo);

CREATE TABLE fastq.task_12 PARTITION OF fastq.task FOR VALUES IN (12) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_12_id ON fastq.task_12 (id);
CREATE TABLE fastq.done_12 PARTITION OF fastq.done FOR VALUES IN (12);
CREATE INDEX done_12_lo ON fastq.done_12 (lo);

CREATE TABLE fastq.task_13 PARTITION OF fastq.task FOR VALUES IN (13) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_13_id ON fastq.task_13 (id);
CREATE TABLE fastq.done_13 PARTITION OF fastq.done FOR VALUES IN (13);
CREATE INDEX done_13_lo ON fastq.done_13 (lo);

CREATE TABLE fastq.task_14 PARTITION OF fastq.task FOR VALUES IN (14) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_14_id ON fastq.task_14 (id);
CREATE TABLE fastq.done_14 PARTITION OF fastq.done FOR VALUES IN (14);
CREATE INDEX done_14_lo ON fastq.done_14 (lo);

CREATE TABLE fastq.task_15 PARTITION OF fastq.task FOR VALUES IN (15) WITH (autovacuum_analyze_scale_factor = 0.5);
CREATE UNIQUE INDEX task_15_id ON fastq.task_15 (id);
CREATE TABLE fastq.done_15 PARTITION OF fastq.done FOR VALUES IN (15);
CREATE INDEX done_15_lo ON fastq.done_15 (lo);

-- A chunk: a run without gaps of waiting tasks that are alike. Born complete; hi never changes, lo only grows.
CREATE TABLE fastq.ready (
    rid          bigint NOT NULL DEFAULT nextval('fastq.rid'),
    lo           bigint NOT NULL,
    hi           bigint NOT NULL,
    lane         integer NOT NULL,
    track        smallint NOT NULL DEFAULT 0,  -- 0 ordinary, 1 front (given back), 2 careful (lost once), 3 alone (lost again), 4 alone (and lost on 2 without a charge)
    leaf         smallint NOT NULL,
    attempts     smallint NOT NULL DEFAULT 0,  -- runs charged so far
    max_attempts smallint NOT NULL,
    task_bytes   integer NOT NULL,             -- payload of one task, the mean rounded up: bounds what a claim reads
    expires_at   timestamptz                   -- the earliest of its tasks
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, vacuum_truncate = off);
CREATE UNIQUE INDEX ready_hi ON fastq.ready (hi);
CREATE INDEX ready_lane ON fastq.ready (lane, track, rid);
CREATE INDEX ready_careful ON fastq.ready (lane) WHERE track >= 2;

-- What a consumer took in one fetch of one lane. The authority on who runs what.
CREATE TABLE fastq.claim (
    consumer     bigint NOT NULL,
    no           bigint NOT NULL,              -- made by the consumer, never used twice
    claimed_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    lane         integer NOT NULL,
    track        smallint NOT NULL,
    leaf         smallint NOT NULL,
    attempts     smallint NOT NULL,
    max_attempts smallint NOT NULL,
    task_bytes   integer NOT NULL,
    ids          int8multirange NOT NULL,      -- still in flight
    PRIMARY KEY (consumer, no)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, vacuum_truncate = off);

-- A task that waits for a time. Content lies in its leaf, or here (payload) if it was never in one or the leaf had to go.
CREATE TABLE fastq.delayed (
    id           bigint PRIMARY KEY,
    run_at       timestamptz NOT NULL,
    created_at   timestamptz,                  -- NULL: as in its leaf
    lane         integer NOT NULL,
    leaf         smallint,
    attempts     smallint NOT NULL DEFAULT 0,
    max_attempts smallint NOT NULL,
    task_bytes   integer NOT NULL,
    kind         text NOT NULL CHECK (kind IN ('scheduled', 'retrying')),
    format       "char",
    payload      bytea,
    expires_at   timestamptz,
    CHECK ((leaf IS NULL) = (payload IS NOT NULL AND format IS NOT NULL AND created_at IS NOT NULL))
);
CREATE INDEX delayed_run_at ON fastq.delayed (run_at);
CREATE INDEX delayed_leaf ON fastq.delayed (leaf) WHERE leaf IS NOT NULL;

-- A task that ended badly, kept with its payload for its own retention.
CREATE TABLE fastq.dead (
    id           bigint PRIMARY KEY,
    ended_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_at   timestamptz NOT NULL,
    lane         integer NOT NULL,
    attempts     smallint NOT NULL,
    max_attempts smallint NOT NULL,
    state        text NOT NULL CHECK (state IN ('failed', 'cancelled', 'expired')),
    format       "char" NOT NULL,
    payload      bytea NOT NULL,
    expires_at   timestamptz
);
CREATE INDEX dead_ended_at ON fastq.dead (ended_at);

-- One failed or lost attempt.
CREATE TABLE fastq.attempt_error (
    id        bigint NOT NULL,                 -- of the task
    failed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    consumer  bigint NOT NULL,
    no        bigint NOT NULL,
    took_us   bigint,                          -- NULL: lost with its worker
    attempt   smallint NOT NULL,
    error     text NOT NULL,
    traceback text NOT NULL DEFAULT ''
);
CREATE INDEX attempt_error_id ON fastq.attempt_error (id);

-- Idempotency tokens, unique per type, held while their task is kept.
CREATE TABLE fastq.token (
    type       text COLLATE "C" NOT NULL,
    token      text COLLATE "C" NOT NULL,
    id         bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT statement_timestamp(),
    PRIMARY KEY (type, token)
);

-- A live process, or one that died and whose claims are being rescued.
CREATE TABLE fastq.consumer (
    id         bigint PRIMARY KEY,             -- 63 random bits a registration
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    beat_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    dead_at    timestamptz,
    pid        integer NOT NULL,
    stopping   boolean NOT NULL DEFAULT false,
    host       text NOT NULL,
    version    text NOT NULL,
    types      text[] NOT NULL,
    queues     text[],                         -- NULL: all
    running    int8multirange NOT NULL DEFAULT '{}'  -- at the last beat
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

-- The leader's lease. The leader saves work; it never makes a move safe.
CREATE TABLE fastq.leader (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    holder     bigint NOT NULL,
    term       bigint NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- One row a task with its state, for people and psql. A state is where the id is found. OFFSET 0: joined on the leaf, each of
-- its tasks met each of its flushes.
CREATE VIEW fastq.tasks AS
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
