"""The demo: real tasks from a file, through two workers, one of which is killed, and what became of each line.

``fastq demo`` (``make demo``) runs it. It uses fastq as anybody would: the tasks come in by ``fastq enqueue --file``, two
``fastq worker`` processes run them. What it claims at the end it has read from the tables, by plain SQL, and from what the
handlers wrote down themselves; the engine's own counters are not asked.

::

    load      makes the JSON Lines file, and reads it back to know what should become of each line
    tasks     the app: three handlers
    runlog    where handlers write down each run, in a file that survives SIGKILL
    service   the loopback service that two of the handlers talk to
    commands  the fastq processes
    tables    what the database says
    audit     compares the file, the tables and the run logs
    run       all of it, in order
"""
