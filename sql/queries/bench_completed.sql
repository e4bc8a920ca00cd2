-- How many completions are stored, each of them counted.
SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM fastq.done d, unnest(d.ids) r
