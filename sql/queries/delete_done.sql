-- Take those of tasks $1 that completed out of their flushes; forget_tasks.sql does the rest, in the same transaction. Answers their ids. lo
-- stays the first id of its row, which look-ups and lists rely on, and the run time goes on for those that are left. A row that another
-- deletion changed meanwhile may be missed here, for the caller to come again: what is answered was taken.
WITH sent AS MATERIALIZED (
    SELECT range_agg(int8range(i, i, '[]')) AS ids FROM unnest($1::bigint[]) i
), locked AS MATERIALIZED (
    SELECT lo, ids FROM fastq.done
     WHERE lo = ANY (ARRAY (SELECT f.lo FROM unnest($1) i, LATERAL (SELECT lo FROM fastq.done WHERE lo BETWEEN i - 1023 AND i AND ids @> i OFFSET 0) f))
       AND ids && (SELECT ids FROM sent)
     ORDER BY lo FOR UPDATE
), parts AS MATERIALIZED (
    SELECT l.lo, l.ids * s.ids AS ok, l.ids - s.ids AS rest FROM locked l, sent s
), emptied AS MATERIALIZED (
    DELETE FROM fastq.done WHERE lo = ANY (ARRAY (SELECT lo FROM parts WHERE isempty(rest))) RETURNING lo
), shrunk AS MATERIALIZED (
    UPDATE fastq.done d SET ids = (SELECT p.rest FROM parts p WHERE p.lo = d.lo), lo = (SELECT lower(p.rest) FROM parts p WHERE p.lo = d.lo),
           took_us = d.took_us * (SELECT sum(upper(r) - lower(r)) FROM parts p, unnest(p.rest) r WHERE p.lo = d.lo)::bigint
                     / (SELECT sum(upper(r) - lower(r)) FROM unnest(d.ids) r)::bigint
     WHERE lo = ANY (ARRAY (SELECT lo FROM parts WHERE NOT isempty(rest))) RETURNING lo
)
SELECT i AS id
  FROM parts p, unnest(p.ok) r, generate_series(lower(r), upper(r) - 1) i
 WHERE CASE WHEN isempty(p.rest) THEN p.lo IN (SELECT lo FROM emptied) ELSE lower(p.rest) IN (SELECT lo FROM shrunk) END
