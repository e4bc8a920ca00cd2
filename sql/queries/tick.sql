-- Once a tick and consumer: take or keep the leader's lease, and look what there is to do.
-- $1 consumer, $2 lease in seconds, renewed when less than $3 seconds are left, $4 seconds of silence that are death, $5 whether it may lead.
-- lanes is counted beside its last id: ids commit out of order. careful_lanes: those with tasks on track 2; alone_lanes: on track 3 or 4.
WITH renewed AS (
    INSERT INTO fastq.leader AS l (holder, term, expires_at)
    SELECT $1::bigint, 1, clock_timestamp() + $2::double precision * interval '1 second'
     WHERE $5::boolean
       AND NOT EXISTS (SELECT FROM fastq.leader
                        WHERE expires_at > statement_timestamp() + CASE holder WHEN $1 THEN $3::double precision ELSE 0 END * interval '1 second')
    ON CONFLICT (one) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at,
           term = l.term + CASE WHEN l.holder = excluded.holder AND l.expires_at > clock_timestamp() THEN 0 ELSE 1 END
     WHERE l.expires_at < clock_timestamp() OR l.holder = excluded.holder
    RETURNING holder, term
), lease AS (
    SELECT holder, term FROM renewed
    UNION ALL
    SELECT holder, term FROM fastq.leader WHERE expires_at > statement_timestamp() AND NOT EXISTS (SELECT FROM renewed)
)
SELECT extract(epoch FROM clock_timestamp())::double precision AS now,
       (SELECT term FROM lease WHERE holder = $1) AS term,
       (SELECT max(id) FROM fastq.lane) AS last_lane,
       (SELECT count(*) FROM fastq.lane) AS lanes,
       (SELECT no FROM fastq.leaf WHERE state = 'open' LIMIT 1) AS open_leaf,
       ARRAY (SELECT id FROM fastq.consumer WHERE dead_at IS NULL AND beat_at < statement_timestamp() - $4::double precision * interval '1 second') AS silent,
       EXISTS (SELECT FROM fastq.claim c WHERE NOT EXISTS (SELECT FROM fastq.consumer k WHERE k.id = c.consumer AND k.dead_at IS NULL)) AS orphaned,
       EXISTS (SELECT FROM fastq.consumer WHERE dead_at IS NOT NULL) AS dead,
       ARRAY (SELECT l.id FROM fastq.lane l WHERE EXISTS (SELECT FROM fastq.ready r WHERE r.lane = l.id AND r.track = 2 OFFSET 0)) AS careful_lanes,
       ARRAY (SELECT l.id FROM fastq.lane l WHERE EXISTS (SELECT FROM fastq.ready r WHERE r.lane = l.id AND r.track >= 3 OFFSET 0)) AS alone_lanes,
       (SELECT extract(epoch FROM run_at - clock_timestamp())::double precision FROM fastq.delayed ORDER BY run_at LIMIT 1) AS due_in,
       EXISTS (SELECT FROM fastq.ready WHERE expires_at <= statement_timestamp())
       OR EXISTS (SELECT FROM fastq.delayed WHERE expires_at <= statement_timestamp()) AS expired
