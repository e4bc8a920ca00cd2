"""CPU time of the server's processes, read from /proc: on Linux, where the server is on this machine and lets it be seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
#: Seconds by which the server's and this machine's word on a process's age may differ: /proc counts in hundredths, and asking takes time.
_AGE_ERROR: Final = 1.0


def cpu_seconds(pid: int) -> float | None:
    """CPU time that a process has used so far; None: it has ended, or can't be seen. PostgreSQL's have one thread each."""
    try:
        # Nanoseconds; the other file has hundredths of a second, and is there on every kernel.
        return int((_PROC / str(pid) / "schedstat").read_bytes().split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        fields = _stat(pid)
        return None if fields is None else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_here(pid: int, age: float) -> bool:
    """Whether the server's process ``pid``, which it says is ``age`` seconds old, is one of this machine's.

    The number alone tells nothing where the server runs in a container or elsewhere.
    """
    fields = _stat(pid)
    if fields is None:
        return False
    try:
        if not (_PROC / str(pid) / "comm").read_text().startswith("postgres"):
            return False
        uptime = float((_PROC / "uptime").read_text().split()[0])
    except (OSError, ValueError):
        return False
    return abs(uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK") - age) <= _AGE_ERROR


def memory_bytes(pid: int, *, peak: bool = False) -> int | None:
    """Memory of a process that is in RAM now, or at most so far; None: it has ended, or can't be seen."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    try:
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _stat(pid: int) -> list[bytes] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The name before may hold blanks and brackets.
    return text[text.rindex(b")") + 2 :].split()


__all__ = ["cpu_seconds", "is_here", "memory_bytes"]
