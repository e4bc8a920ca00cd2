"""What ends a benchmark."""

from __future__ import annotations

from fastq.errors import FastqError


class BenchError(FastqError):
    """A benchmark gives no figure: the work was not done as it should, or it could not be measured."""


__all__ = ["BenchError"]
