-- The list of schema steps that were applied, and the oldest fastq that may still work on the schema after each.
CREATE TABLE IF NOT EXISTS fastq.migration (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    oldest     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
