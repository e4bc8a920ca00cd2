"""The public surface under a type checker, as its users have one."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_mypy_sees_what_surface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(_ROOT)
    out, err, status = api.run(["tests/typing/surface.py", "--cache-dir=.mypy_cache"])
    assert (status, err) == (0, ""), out


def test_the_marker_is_there() -> None:
    assert (_ROOT / "python" / "fastq" / "py.typed").exists()
