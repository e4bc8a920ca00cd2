-- Take the turn among processes that migrate schema $1; given up at the end of the transaction, also by a killed process.
SELECT pg_advisory_xact_lock(hashtextextended('fastq migration of ' || $1::text, 0))
