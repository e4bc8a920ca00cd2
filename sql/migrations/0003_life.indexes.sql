-- What step 3 looks things up by, in tables that may be large and in use: each built in the step where its table is small, else behind it,
-- while all go on (python/fastq/_indexes.py). One statement an index, `CREATE INDEX CONCURRENTLY name ON fastq.table …;`.

-- A task that is deleted frees its token. Only tasks with tokens pay.
CREATE INDEX CONCURRENTLY token_id ON fastq.token (id);

-- Each queue keeps each kind of end for its own time.
CREATE INDEX CONCURRENTLY dead_lane_ended_at ON fastq.dead (lane, state, ended_at);

-- The leader looks by these for what has expired and no consumer claims. Tasks without such a time are in neither.
CREATE INDEX CONCURRENTLY ready_expires_at ON fastq.ready (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX CONCURRENTLY delayed_expires_at ON fastq.delayed (expires_at) WHERE expires_at IS NOT NULL;
