-- Before a leaf is emptied, in that transaction: wait for its writers and keep new ones out; readers, claims among them, go on.
-- {leaf} is its two-digit number. Only then can it be asked whether anything names the leaf: a commit that was under way is seen.
LOCK TABLE ONLY fastq.task_{leaf}, ONLY fastq.done_{leaf} IN SHARE ROW EXCLUSIVE MODE
