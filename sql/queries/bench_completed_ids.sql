-- The ids that are completed at least once, as ranges from (included) to (excluded), in order and with gaps between them.
SELECT lower(r), upper(r) FROM (SELECT range_agg(i) AS ids FROM fastq.done d, unnest(d.ids) i) a, unnest(a.ids) r ORDER BY 1
