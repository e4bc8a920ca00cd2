"""How long a queue keeps its ended tasks, where it is not as long as the others do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta

from fastq.errors import SettingsError
from fastq.task import to_seconds


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a queue's ended tasks are kept; 0 is at once, as soon as the leader comes by (a second or two).

    Args:
        completed: seconds, or a timedelta; None: as the consumer's ``completed_retention`` has it. Tasks lie in tables that are emptied
            whole once all in them is due, so a queue that keeps them for less time than another costs the deletion of single rows.
        failed: likewise, for those that failed for good.
        cancelled: likewise.
        expired: likewise, for those that were not begun in time.

    Raises:
        SettingsError: a time is negative, or none at all.
    """

    completed: float | timedelta | None = None
    failed: float | timedelta | None = None
    cancelled: float | timedelta | None = None
    expired: float | timedelta | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                try:
                    object.__setattr__(self, one.name, to_seconds(one.name, value))
                except TypeError as error:
                    raise SettingsError(str(error)) from None


__all__ = ["Retention"]
