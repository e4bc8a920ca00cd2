-- fastq, schema step 3: the whole life of a task.
-- oldest fastq: 0.1.0

-- A task that is deleted frees its token. Only tasks with tokens pay.
CREATE INDEX token_id ON fastq.token (id);
-- Each queue keeps each kind of end for its own time.
CREATE INDEX dead_lane_ended_at ON fastq.dead (lane, state, ended_at);

-- What a handler returned, where its type keeps results: written with the completion, once, for those who wait for it.
CREATE TABLE fastq.result (
    id         bigint PRIMARY KEY,             -- of the task
    expires_at timestamptz NOT NULL,           -- nobody is shown it from then on; the leader removes it soon after
    format     "char" NOT NULL,                -- j: JSON in UTF-8, b: raw bytes
    value      bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX result_expires_at ON fastq.result (expires_at);
