"""The table of guards keeps up with the source; that they matter is shown by ``make guards``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import psycopg
import pytest

from fastq import _engine
from tests.support.faults.guards import GUARDS, ROOT, Guard

#: PREPARE takes no LOCK TABLE.
_NOT_PREPARED: Final = {"lock_leaf"}

guards = pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)


@guards
def test_a_guard_stands_where_the_table_says(guard: Guard) -> None:
    assert guard.taken_out() != (ROOT / guard.file).read_text()


@guards
def test_the_tests_of_a_guard_are_there(guard: Guard) -> None:
    assert guard.tests
    for name in guard.tests:
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE), name


def test_guarded_statements_are_statements(dsn: str, migrated: str) -> None:
    """``make guards`` runs this beside each test: what a changed text breaks must not be its syntax."""
    names = sorted({Path(guard.file).stem for guard in GUARDS if guard.file.endswith(".sql")} - _NOT_PREPARED)
    with psycopg.connect(dsn, autocommit=True) as db:
        for name in names:
            text = f"PREPARE {name} AS {_engine.render(_engine.queries()[name], migrated)}"
            db.execute(text.encode())


def test_guards_are_named_apart() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
