"""The error of the private PostgreSQL, apart so that its modules need not import each other for it."""

from __future__ import annotations

from fastq.errors import FastqError


class EmbeddedError(FastqError):
    """The private PostgreSQL can't be had: the message says what failed, and shows the end of the server's log."""
