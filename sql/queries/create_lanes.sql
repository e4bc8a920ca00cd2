-- Lanes like $1, by id, with priority $2, where they are new.
INSERT INTO fastq.lane (queue, type, priority)
SELECT DISTINCT o.queue, o.type, $2::smallint FROM fastq.lane o
 WHERE o.id = ANY ($1::integer[])
   AND NOT EXISTS (SELECT FROM fastq.lane n WHERE n.queue = o.queue AND n.type = o.type AND n.priority = $2)
ON CONFLICT DO NOTHING
RETURNING id
