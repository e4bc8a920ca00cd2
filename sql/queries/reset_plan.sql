-- Put back what set_plan.sql changed: compiling is $1 again, scans of whole tables are $2.
SELECT set_config('jit', $1::text, true), set_config('enable_seqscan', $2::text, true)
