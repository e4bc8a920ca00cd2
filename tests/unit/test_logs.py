"""The engine's log records in ``logging``."""

from __future__ import annotations

import logging

import pytest

from fastq.logs import emit


def test_records_go_to_the_loggers_of_their_parts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastq")
    emit([(20, "claimer", "100% of it"), (40, "fastq.engine", "down"), (10, "fastq", "x")])
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("fastq.claimer", logging.INFO, "100% of it"),
        ("fastq.engine", logging.ERROR, "down"),
        ("fastq", logging.DEBUG, "x"),
    ]


def test_a_handler_that_raises_stops_none_of_them(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError(record.name)

    caplog.set_level(logging.INFO, "fastq")
    broken = logging.getLogger("fastq.broken")
    broken.addFilter(filter_ := Broken())
    try:
        emit([(20, "broken", "lost"), (20, "whole", "there")])
    finally:
        broken.removeFilter(filter_)
    assert [r.getMessage() for r in caplog.records] == ["there"]
