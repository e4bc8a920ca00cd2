"""Measure fastq on a database: public, so that a figure can be had, and doubted, by anyone.

Each benchmark goes through the public API with fastq's own defaults, in a schema of its own that is dropped at the end. It gives a
figure only once the tables, and the handlers themselves, say that every task was done exactly once. A rate counts durable commits
over wall time.
"""

from __future__ import annotations

from fastq.bench._errors import BenchError
from fastq.bench._handlers import Kind
from fastq.bench._result import FIGURES, Measured, Result
from fastq.bench._stopping import Stopped
from fastq.bench._waiting import Progress, no_progress
from fastq.bench.batch1 import Batch1
from fastq.bench.drain import Drain
from fastq.bench.enqueue import Enqueue
from fastq.bench.foreign import Foreign
from fastq.bench.latency import Latency
from fastq.bench.lists import Lists
from fastq.bench.retention import Retention
from fastq.bench.single import Single
from fastq.bench.snapshot import Snapshot
from fastq.bench.steady import Steady

__all__ = [
    "FIGURES",
    "Batch1",
    "BenchError",
    "Drain",
    "Enqueue",
    "Foreign",
    "Kind",
    "Latency",
    "Lists",
    "Measured",
    "Progress",
    "Result",
    "Retention",
    "Single",
    "Snapshot",
    "Steady",
    "Stopped",
    "no_progress",
]
