"""The schema's steps as they are written, and which version of fastq may work on which."""

from __future__ import annotations

import re

import pytest

from fastq import _engine
from fastq.migrations import _parts, _steps


def test_steps_are_numbered_without_gaps() -> None:
    assert [version for version, *_ in _engine.migrations()] == list(range(1, len(_steps()) + 1))


def test_every_step_says_which_fastq_may_still_work() -> None:
    for step in _steps().values():
        assert _parts(step.oldest) <= _parts(_engine.version), step.name


def test_no_step_names_a_schema_of_its_own() -> None:
    """The prefix is replaced; what has none would land wherever the search path points."""
    for step in _steps().values():
        for text in (step.up, step.down):
            statements = re.sub("--.*", "", text)
            made = re.findall(
                r"(?:TABLE|SEQUENCE|VIEW|INDEX \w+ ON|DROP INDEX(?: IF EXISTS)?|INTO|FUNCTION) +(?!ONLY)([^\s(,;]+)",
                statements,
            )
            assert made
            assert all(name.startswith("fastq.") for name in made), (step.name, made)


def test_every_index_of_a_step_is_read_and_undone() -> None:
    for version, name, _, down, indexes in _engine.migrations():
        statements = [one for one in re.sub("--.*", "", indexes).split(";") if one.strip()]
        assert len(_steps()[version].indexes) == len(statements), name
        for index in _steps()[version].indexes:
            assert re.search(rf"DROP INDEX IF EXISTS [^;]*\bfastq\.{index.name}\b", down), index.name


@pytest.mark.parametrize(
    ("older", "newer"),
    [("0.1.0", "0.2.0"), ("0.9.0", "0.10.0"), ("1.0.0", "1.0.1"), ("1.9.9", "2.0.0"), ("0.1", "0.1.1")],
)
def test_versions_are_compared_by_number(older: str, newer: str) -> None:
    assert _parts(older) < _parts(newer)


def test_a_release_candidate_counts_as_its_release() -> None:
    assert _parts("1.2.0rc1") == _parts("1.2.0") == _parts("1.2.0.dev3")[:3]
