-- Before truncate_leaf, in the same transaction: leaf $1 may be opened again.
UPDATE fastq.leaf SET state = 'empty', opened_at = NULL, closed_at = NULL WHERE no = $1::smallint AND state = 'closed'
