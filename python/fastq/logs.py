"""The engine's log records on their way into ``logging``, under ``fastq.*``."""

from __future__ import annotations

import logging
from collections.abc import Iterable


def emit(records: Iterable[tuple[int, str, str]]) -> None:
    """Hand records (level, part, message) to the loggers ``fastq.<part>``. A handler that raises stops none of them."""
    for level, part, message in records:
        name = part if part.partition(".")[0] == "fastq" else f"fastq.{part}"
        try:
            logging.getLogger(name).log(level, "%s", message)
        except Exception:  # a logging handler of the user's; the next record may get through
            logging.getLogger("fastq").debug("a log record was lost", exc_info=True)


__all__ = ["emit"]
