-- The ids of up to $1 tasks in rising order, above id $2 (0: from the bottom), of lanes $3 (NULL: all), of the kinds of pending in $4
-- (ready, scheduled, retrying), running if $5, completed if $6, of the ends in $7: list_tasks_by_id_ascending.sql without their contents.
(SELECT i AS id
   FROM (SELECT greatest(lo, $2::bigint + 1) AS lo, hi FROM fastq.ready
          WHERE hi > $2 AND ($3::integer[] IS NULL OR lane = ANY ($3)) AND 'ready' = ANY ($4::text[])
          ORDER BY ready.hi LIMIT $1::bigint) r,
        generate_series(lo, least(hi, lo + $1 - 1)) i
  ORDER BY i LIMIT $1)
UNION ALL
(SELECT id FROM fastq.delayed
  WHERE id > $2 AND ($3 IS NULL OR lane = ANY ($3)) AND kind = ANY ($4) ORDER BY id LIMIT $1)
UNION ALL
(SELECT i
   FROM (SELECT greatest(lower(r), $2 + 1) AS lo, upper(r) - 1 AS hi FROM fastq.claim, unnest(ids) r
          WHERE $5::boolean AND upper(r) > $2 + 1 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lower(r) LIMIT $1) c,
        generate_series(lo, least(hi, lo + $1 - 1)) i
  ORDER BY i LIMIT $1)
UNION ALL
(SELECT i
   FROM (SELECT ids FROM fastq.done
          WHERE $6::boolean AND lo > $2 - 1024 AND ($3 IS NULL OR lane = ANY ($3)) ORDER BY lo LIMIT $1 + 1024) d,
        unnest(ids) r, generate_series(greatest(lower(r), $2 + 1), least(upper(r), greatest(lower(r), $2 + 1) + $1) - 1) i
  ORDER BY i LIMIT $1)
UNION ALL
(SELECT id FROM fastq.dead
  WHERE id > $2 AND ($3 IS NULL OR lane = ANY ($3)) AND state = ANY ($7::text[]) ORDER BY id LIMIT $1)
ORDER BY 1 LIMIT $1
