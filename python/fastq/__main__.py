"""``python -m fastq``: the command line."""

from __future__ import annotations

from fastq.cli import main

if __name__ == "__main__":
    main(prog_name="fastq")
