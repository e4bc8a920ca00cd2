"""Fixtures for tests that force faults, and which of them run when.

``make test`` runs those that are not marked ``faults``, once, with short times. ``make faults`` sets FASTQ_FAULT_REPEATS, and runs all
of them at fastq's default settings, what is a race so many times.
"""

from __future__ import annotations

import os
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.faults.takes import Takes
from tests.support.faults.trials import DEFAULTS, QUICK, Pace, Rows, Trials

_REPEATS: Final = "FASTQ_FAULT_REPEATS"
#: Repeats at a time; each has a few processes, which mostly wait.
_AT_ONCE: Final = "FASTQ_FAULT_AT_ONCE"
#: Seconds that a test may take with all its repeats.
_TIMEOUT: Final = 3600
_HERE: Final = Path(__file__).parent
_ROWS: Final = pytest.StashKey[Rows]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: only in `make faults`")
    config.stash[_ROWS] = Rows()


def _repeats() -> int | None:
    text = os.environ.get(_REPEATS)
    return int(text) if text else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _HERE in item.path.parents]
    if _repeats() is not None:
        for item in ours:
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
        return
    left = [item for item in ours if item.get_closest_marker("faults") is not None]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process among several hands its lines to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fault_rows"] = [astuple(row) for row in session.config.stash[_ROWS].rows]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    """Such a process has ended, perhaps not as it should."""
    for row in getattr(node, "workeroutput", {}).get("fault_rows", []):
        node.config.stash[_ROWS].add(*row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_ROWS].rows:
        terminalreporter.section("faults")
        for line in config.stash[_ROWS].lines():
            terminalreporter.write_line(line)


@pytest.fixture
def pace() -> Pace:
    """fastq's defaults in `make faults`, else quicker."""
    return QUICK if _repeats() is None else DEFAULTS


@pytest.fixture
def repeats() -> int:
    """How often a race is run."""
    return _repeats() or 1


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> Rows:
    """The table at the end: a test that measures adds its line."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture
def trials(dsn: str, tmp_path: Path, pace: Pace, repeats: int, rows: Rows) -> Trials:
    """Repeats of a fault on the session's server, each in a schema of its own."""
    return Trials(dsn, tmp_path, pace, repeats, int(os.environ.get(_AT_ONCE, "4")), rows)


@pytest.fixture
def takes(tmp_path: Path, repeats: int, rows: Rows) -> Takes:
    """Repeats of a fault on servers of their own; without FASTQ_FAULT_REPEATS, one."""
    return Takes(tmp_path, repeats, rows)
