"""``make guards``: takes each guard out of a copy of the tree, builds it, and demands that the tests named for it fail.

First all of those tests must pass with every guard in its place. A guard whose text the source no longer has is an error: whoever
moved it moves its entry in ``tests/support/faults/guards.py``.

Arguments: parts of guards' names; without any, all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.support.databases import any_database
from tests.support.faults.guards import GUARDS, ROOT, Guard

_WORK: Final = ROOT / "target" / "guards"
_TREE: Final = _WORK / "tree"
#: A statement that is no longer one would fail any test: this one must pass all the same.
_PREPARES: Final = "tests/faults/test_guards.py::test_guarded_statements_are_statements"
#: Where a guard kept a statement from waiting, it waits, as a test does for what will not come about: not for long.
_SETTINGS: Final = {"PGOPTIONS": "-c lock_timeout=5s", "FASTQ_TEST_PATIENCE": "10"}


def main(parts: Sequence[str]) -> int:
    """Runs them. Gives the exit status."""
    chosen = [guard for guard in GUARDS if not parts or any(part in guard.name for part in parts)]
    if not chosen:
        _say(f"no guard is named like {' or '.join(parts)}")
        return 2
    # Before anything is built.
    texts = {guard: guard.taken_out() for guard in GUARDS}
    _copy_tree()
    with any_database() as database:
        env = os.environ | _SETTINGS | {"FASTQ_TEST_DSN": database.dsn, "PYTHONPATH": str(_TREE / "python")}
        env.pop("FASTQ_FAULT_REPEATS", None)
        _build()
        names = sorted({test for guard in chosen for test in guard.tests} | {_PREPARES})
        _say(f"{len(names)} tests with every guard in its place")
        if wrong := [name for name, outcome in _run(names, env).items() if outcome != "passed"]:
            _say("these fail, or are not there, before anything is taken out:", *wrong)
            return 1
        results = [(guard, *_examine(guard, texts[guard], env)) for guard in chosen]
    width = max(len(guard.name) for guard in chosen)
    _say("", f"{'guard':{width}}  without it")
    for guard, is_shown, what in results:
        _say(f"{guard.name:{width}}  {what if is_shown else 'NOT SHOWN: ' + what}")
    shown = sum(is_shown for _, is_shown, _ in results)
    _say("", f"{shown} of {len(results)} guards are shown to matter")
    return 0 if shown == len(results) else 1


def _examine(guard: Guard, text: str, env: Mapping[str, str]) -> tuple[bool, str]:
    """Whether the tests named for it fail without it, and what was seen."""
    path = _TREE / guard.file
    before = path.read_text()
    began = time.monotonic()
    path.write_text(text)
    try:
        _build()
        outcomes = _run([*guard.tests, _PREPARES], env)
    except subprocess.CalledProcessError:
        return False, "it does not build"
    finally:
        path.write_text(before)
    if outcomes.pop(_PREPARES) != "passed":
        return False, "its statement is none any more"
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    what = ", ".join(f"{name.partition('::')[2]} {outcome}" for name, outcome in outcomes.items())
    _say(f"{guard.name}: {what} ({time.monotonic() - began:.0f} s)")
    return len(failed) == len(guard.tests), what


def _copy_tree() -> None:
    """What git knows or would take in, as it is in the working tree; only what differs is written, so that little is built again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    wanted = {Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for path in wanted:
        new, old = ROOT / path, _TREE / path
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new, old)
    for path in list(_files(_TREE)):
        if path not in wanted and path.suffix != ".so":
            (_TREE / path).unlink()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and not path.relative_to(folder).parts[0].startswith(".pytest")
        ):
            yield path.relative_to(folder)


def _build() -> None:
    """The engine of the copy, where its Python looks for it."""
    target = _WORK / "build"
    subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--profile=fastdev", "--features=python"],
        cwd=_TREE,
        check=True,
        # A guard that was taken out leaves something unused.
        env=os.environ | {"CARGO_TARGET_DIR": str(target), "PYO3_PYTHON": sys.executable, "RUSTFLAGS": "-Awarnings"},
    )
    # A new file: a process that still has the old one mapped keeps it.
    new = _TREE / "python" / "fastq" / "_core.new"
    shutil.copyfile(target / "fastdev" / "lib_core.so", new)
    new.replace(new.with_name("_core.abi3.so"))


def _run(names: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """What became of each test: passed; failed, with any choice of its parameters; missing, or broken around the test itself."""
    report = _WORK / "report.xml"
    report.unlink(missing_ok=True)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--timeout=100",
        f"--junitxml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *names],
        cwd=_TREE,
        check=False,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    cases: dict[str, set[str]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 our own pytest wrote it
        outcome = (
            "broken" if case.find("error") is not None else "failed" if case.find("failure") is not None else "passed"
        )
        if case.find("skipped") is not None:
            outcome = "skipped"
        id_ = f"{case.get('file')}::{case.get('name')}"
        for name in {id_, id_.partition("[")[0]} & set(names):
            cases.setdefault(name, set()).add(outcome)
    return {name: _worst(cases.get(name, {"missing"})) for name in names}


def _worst(outcomes: set[str]) -> str:
    return next(each for each in ("broken", "failed", "missing", "skipped", "passed") if each in outcomes)


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
