"""JSON Lines: a task a line, its keys the words of `fastq.Task`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO, Final, NamedTuple, Never

from fastq import _engine
from fastq._backoff import from_words
from fastq._options import read_name
from fastq.errors import FastqError
from fastq.settings import PAYLOAD_LIMIT
from fastq.task import Task, TaskKeywords

KEYS: Final = tuple(sorted({*Task.__slots__, *TaskKeywords.__annotations__} - {"_extras"}))
# A payload's source is longer than what is stored: at worst six characters (an escape) stand for one.
_LINE_LIMIT: Final = 8 * PAYLOAD_LIMIT


class BadLineError(Exception):
    """A line that is no task: why."""


class Line(NamedTuple):
    """A line that is not blank."""

    number: int
    task: Task | None
    error: str | None
    """Why it is no task; None: it is one."""
    size: int
    """Bytes."""


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of ``file`` but the blank ones, in memory bounded also where a line never ends."""
    number = 0
    while data := file.readline(_LINE_LIMIT):
        number += 1
        size = len(data)
        if size == _LINE_LIMIT and not data.endswith(b"\n"):
            while (rest := file.readline(_LINE_LIMIT)) and not rest.endswith(b"\n"):
                size += len(rest)
            yield Line(number, None, f"it is longer than {_LINE_LIMIT:,} bytes", size + len(rest))
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.isspace() or not data:
            continue
        try:
            yield Line(number, parse(data), None, size)
        except BadLineError as error:
            yield Line(number, None, str(error), size)


def parse(data: bytes) -> Task:
    """The task of one line.

    Raises:
        BadLineError: it is none, or one that could not be enqueued.
    """
    try:
        fields = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadLineError(f"it is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadLineError("it is not a JSON object")
    if unknown := [key for key in fields if key not in KEYS]:
        raise BadLineError(f"unknown key {unknown[0]!r:.80}; there are {', '.join(KEYS)}")
    if "type" not in fields:
        raise BadLineError("the key 'type' is missing")
    return make_task(fields)


def make_task(fields: dict[str, Any]) -> Task:
    """A task from its fields, checked as far as no database is needed for it.

    Raises:
        BadLineError: it could not be enqueued.
    """
    try:
        for name in ("run_at", "expires_at"):
            if isinstance(time := fields.get(name), str):
                fields[name] = _read_time(name, time)
        if fields.get("retry") is not None:
            fields["retry"] = from_words(fields["retry"])
        if fields.get("idempotency_token") is not None:
            read_name("idempotency_token", fields["idempotency_token"])
        task = Task(**fields)
        read_name("type", task.type)
        read_name("queue", task.queue)
        if (size := len(_engine.encode_json(task.payload))) > PAYLOAD_LIMIT:
            raise BadLineError(f"the payload has {size:,} bytes, but must have at most {PAYLOAD_LIMIT:,}")
    except (FastqError, TypeError) as error:
        raise BadLineError(str(error)) from error
    return task


def _read_time(name: str, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise BadLineError(f"{name} is {text!r:.80}, but must be a time such as 2030-01-31T09:30:00+01:00") from error


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")


__all__ = ["KEYS", "BadLineError", "Line", "make_task", "parse", "read_lines"]
