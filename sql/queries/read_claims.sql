-- What consumer $1 still holds of these claims of its own ($2).
SELECT no, ids FROM fastq.claim WHERE consumer = $1::bigint AND no = ANY ($2::bigint[])
