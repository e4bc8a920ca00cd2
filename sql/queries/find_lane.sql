SELECT id FROM fastq.lane WHERE queue = $1 AND type = $2 AND priority = $3
