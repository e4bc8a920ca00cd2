"""The tasks of a benchmark: one type, a JSON payload of a given size, each with its number in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

from fastq._engine import encode_json
from fastq.bench._session import TYPE
from fastq.errors import SettingsError
from fastq.settings import PAYLOAD_LIMIT
from fastq.task import Task

#: Bytes of a payload unless it is said otherwise.
PAYLOAD_BYTES: Final = 70
# Numbers of ten digits each, so that all payloads have the same size.
_FIRST: Final = 1_000_000_000


class TaskMaker:
    """Makes tasks that are alike but for their numbers.

    Args:
        payload_bytes: of a payload as JSON.
        tokens: each task has an idempotency token of its own.

    Raises:
        SettingsError: a payload of that size can't be made, or not be enqueued.
    """

    def __init__(self, payload_bytes: int = PAYLOAD_BYTES, *, tokens: bool = False) -> None:
        least = len(encode_json({"n": _FIRST, "text": ""}))
        if not least <= payload_bytes <= PAYLOAD_LIMIT:
            raise SettingsError(
                f"payload_bytes is {payload_bytes!r}, but must be from {least} to {PAYLOAD_LIMIT:,} in a benchmark"
            )
        self._text = "x" * (payload_bytes - least)
        self._tokens = tokens
        self._numbers = itertools.count(_FIRST)

    def make(self) -> Task:
        """The next task. For any thread."""
        number = next(self._numbers)
        if self._tokens:
            return Task(TYPE, {"n": number, "text": self._text}, idempotency_token=f"bench-{number}")
        return Task(TYPE, {"n": number, "text": self._text})

    def stream(self, tasks: int) -> Iterator[Task]:
        """The next ``tasks``, each made when it is asked for."""
        text = self._text
        if self._tokens:
            for number in itertools.islice(self._numbers, tasks):
                yield Task(TYPE, {"n": number, "text": text}, idempotency_token=f"bench-{number}")
        else:
            for number in itertools.islice(self._numbers, tasks):
                yield Task(TYPE, {"n": number, "text": text})


__all__ = ["PAYLOAD_BYTES", "TaskMaker"]
