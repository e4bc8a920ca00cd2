-- How many tasks were archived, how many ids they have, and how many completed ones are still kept.
SELECT (SELECT count(*) FROM fastq.archive) AS rows, (SELECT count(DISTINCT id) FROM fastq.archive) AS ids,
       (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM fastq.done d, unnest(d.ids) r) AS completed
