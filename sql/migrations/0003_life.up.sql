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

-- When a task expires is known where it waits: in chunks (the earliest of theirs) and in `delayed`. A claim remembers it, so that what is given back, rescued, put off or retried keeps it; NULL: none of its tasks expires. Older workers do
-- not know it: they run a task past its time, and what goes back into a chunk or waits for a retry by them has lost it.
ALTER TABLE fastq.claim ADD COLUMN expires_at timestamptz;
