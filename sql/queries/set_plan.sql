-- For the rest of the transaction: no compiling (it took a second where the statement took ten milliseconds), scans of whole tables as $1 says.
SELECT set_config('jit', 'off', true), set_config('enable_seqscan', $1::text, true)
