-- What consumer $1, as long as it lives, still holds of these claims of its own ($2): what is gone from them was cancelled, or ended. No
-- row: it was declared dead, and what is gone may be others'.
SELECT n.no, coalesce(c.ids, '{}') AS ids
  FROM unnest($2::bigint[]) AS n (no)
       LEFT JOIN LATERAL (SELECT ids FROM fastq.claim WHERE consumer = $1::bigint AND claim.no = n.no OFFSET 0) c ON true
 WHERE EXISTS (SELECT FROM fastq.consumer WHERE id = $1 AND dead_at IS NULL)
