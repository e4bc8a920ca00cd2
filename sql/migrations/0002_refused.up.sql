-- fastq, schema step 2: what became of results that came too late stands with their consumer.
-- oldest fastq: 0.1.0

-- A result is refused when its claim no longer holds the task: its worker was taken for dead, or stood still. The worker alone knows how
-- many, and its heartbeat says so where it has changed. Older workers leave both columns as they are.
ALTER TABLE fastq.consumer
    ADD COLUMN refused    bigint NOT NULL DEFAULT 0,  -- results of this process, since its start
    ADD COLUMN refused_at timestamptz;                -- when the number last grew, by the heartbeat that said so; NULL: never
