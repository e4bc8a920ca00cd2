"""What some faults need of the machine: without it they are left out by name, but not where all of them are to be shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def miss(what: str) -> NoReturn:
    """This machine does not have it: skips the test, and in ``make faults`` fails it, since a skip there hides what was to be shown."""
    if os.environ.get("FASTQ_FAULT_REPEATS"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need_room(folder: Path, gib: int, why: str) -> None:
    """Misses a disk with so much room."""
    free = shutil.disk_usage(folder).free
    if free < gib << 30:
        miss(f"{why} needs {gib} GiB of disk, and {free >> 30} are free")
