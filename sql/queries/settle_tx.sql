-- What became of tasks that consumer $1 was to complete in transactions of their handlers (complete_tx.sql); element by element: $2 their
-- own claims, $3 ids, $4 new numbers. Answers by claim:
-- done: the transaction has committed.
-- open: it has not ended, or another one (a cancel, a rescue) has the claim locked. Nobody waits for it here.
-- back: it was rolled back, or never wrote. The claim has its new number from here on, so that no statement of such a transaction that
-- is still on its way can find it, nor make what the consumer does next wait. Also where an earlier try, whose answer was lost, did so.
-- missing: no trace of the task; whoever completed it also deleted it, or its queue keeps nothing.
-- lost: others have it.
-- OFFSET 0: looked up one by one, not read into a hash.
-- One snapshot: claim and completion come and go together, so a claim that is seen and can't be locked is open, whatever commits meanwhile.
WITH sent AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::bigint[], $4::bigint[]) AS s (no, id, fresh)
), free AS MATERIALIZED (
    SELECT h.consumer, h.no, s.fresh FROM (SELECT * FROM sent ORDER BY no) s,
           LATERAL (SELECT consumer, no FROM fastq.claim c WHERE c.consumer = $1::bigint AND c.no = s.no FOR UPDATE SKIP LOCKED) h
), back AS (
    UPDATE fastq.claim c SET no = f.fresh FROM free f WHERE c.consumer = ANY (ARRAY[f.consumer]) AND c.no = f.no RETURNING f.no
)
SELECT s.no,
       CASE WHEN s.no IN (SELECT no FROM back) OR EXISTS (SELECT FROM fastq.claim c WHERE c.consumer = $1 AND c.no = s.fresh OFFSET 0) THEN 'back'
            WHEN EXISTS (SELECT FROM fastq.claim c WHERE c.consumer = $1 AND c.no = s.no OFFSET 0) THEN 'open'
            WHEN EXISTS (SELECT FROM fastq.done d WHERE d.lo = s.id AND d.ids @> s.id AND d.consumer = $1 AND d.no = s.no OFFSET 0) THEN 'done'
            WHEN EXISTS (SELECT FROM fastq.task t WHERE t.id = s.id OFFSET 0)
              OR EXISTS (SELECT FROM fastq.delayed w WHERE w.id = s.id OFFSET 0)
              OR EXISTS (SELECT FROM fastq.dead x WHERE x.id = s.id OFFSET 0) THEN 'lost'
            ELSE 'missing' END AS what
  FROM sent s
