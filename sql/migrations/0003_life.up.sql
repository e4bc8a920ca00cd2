-- fastq, schema step 3: the whole life of a task.
-- oldest fastq: 0.1.0

-- A task that is deleted frees its token. Only tasks with tokens pay.
CREATE INDEX token_id ON fastq.token (id);
-- Each queue keeps each kind of end for its own time.
CREATE INDEX dead_lane_ended_at ON fastq.dead (lane, state, ended_at);
