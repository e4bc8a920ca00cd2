-- The ids that wait to be claimed, as bench_completed_ids gives them.
SELECT lower(r), upper(r) FROM (SELECT range_agg(int8range(lo, hi, '[]')) AS ids FROM fastq.ready) a, unnest(a.ids) r ORDER BY 1
