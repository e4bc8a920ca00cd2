-- For the rest of the transaction: no compiling (it took a second where the statement took ten milliseconds), scans of whole tables as $1
-- says. Answers what both were: in a transaction of the user's own they are put back.
WITH was AS MATERIALIZED (SELECT current_setting('jit') AS jit, current_setting('enable_seqscan') AS scan)
SELECT was.jit, was.scan, set_config('jit', 'off', true), set_config('enable_seqscan', $1::text, true) FROM was
