"""The model of docs/model: all its properties hold, and each guard that is taken out is missed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(__file__).parents[2] / "docs" / "model" / "model.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("fastq_model", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As a command it finds its other half beside it.
    sys.path.insert(0, str(_PATH.parent))
    try:
        # Its classes look their own module up.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(_PATH.parent))
    return module


MODEL = _load()


@pytest.mark.parametrize("scene", MODEL.SCENES, ids=lambda scene: scene.name)
def test_all_properties_hold(scene: Any) -> None:
    found = MODEL.search(scene)
    assert found.violation is None, "\n".join(found.trace)
    assert found.states > 100, "a scene in which next to nothing happens proves nothing"


def _first(without: str | None) -> Any:
    """What the first scene shows that shows anything."""
    for scene in MODEL.scenes(without):
        found = MODEL.search(scene, without)
        if found.violation is not None:
            return found
    return None


@pytest.mark.parametrize("guard", sorted(set(MODEL.GUARDS) - MODEL.HARMLESS))
def test_without_a_guard_a_property_is_broken(guard: str) -> None:
    found = _first(guard)
    assert found is not None, f"nothing shows that {guard} is missing"
    assert found.trace[-1] == f"=> {found.violation}"
    assert len(found.trace) > 3


def test_the_leaders_term_makes_no_move_safe() -> None:
    assert _first("term") is None


def test_the_command_prints_the_way_into_the_fault() -> None:
    done = subprocess.run(
        [sys.executable, str(_PATH), "--without", "fence"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "ends twice" in done.stdout
    assert "rescue_claims" in done.stdout
