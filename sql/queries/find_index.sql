-- Whether index $1 of the schema is whole (NULL: it is not there), and how many bytes table $2 has.
SELECT (SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('fastq.' || quote_ident($1::text))),
       pg_relation_size(to_regclass('fastq.' || quote_ident($2::text)))
