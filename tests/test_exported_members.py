"""The public surface: each name in ``__all__`` is there, is loaded lazily where that is said, and has a docstring."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastq
from fastq import errors


def test_all_names_are_there_and_sorted() -> None:
    assert sorted(fastq.__all__, key=str.casefold) == sorted(set(fastq.__all__), key=str.casefold)
    assert set(fastq.__all__) <= set(dir(fastq))
    for name in fastq.__all__:
        assert getattr(fastq, name) is not None


def test_each_error_is_exported() -> None:
    assert set(errors.__all__) <= set(fastq.__all__)


def test_each_lazy_name_is_exported() -> None:
    assert set(fastq._LAZY) <= set(fastq.__all__)


@pytest.mark.parametrize("name", [name for name in fastq.__all__ if not name.startswith("_")])
def test_each_has_a_docstring(name: str) -> None:
    assert getattr(fastq, name).__doc__


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Job'"):
        _ = fastq.Job  # type: ignore[attr-defined]


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, fastq; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"psycopg", "click", "rich", "asyncio", "fastq._core", "fastq.embedded"} & set(loaded)


def test_a_producer_a_consumer_and_an_app_need_no_psycopg() -> None:
    code = "import sys, fastq; fastq.Producer, fastq.Consumer, fastq.App; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"psycopg", "click", "rich", "fastq.embedded"} & set(loaded)
