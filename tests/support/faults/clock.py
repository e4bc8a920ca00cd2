"""Processes whose wall clock is off, as on a host without time synchronisation. Their monotonic clock is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

_SHIM: Final = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    const char *seconds = getenv("FASTQ_TEST_CLOCK_SHIFT");
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def find_compiler() -> str | None:
    """The C compiler that the shim needs; None: there is none."""
    return shutil.which("cc") or shutil.which("gcc")


class Clocks:
    """Builds the shim into ``folder``. A process that loads it asks the system for the time of day and gets another."""

    def __init__(self, folder: Path) -> None:
        compiler = find_compiler()
        assert compiler is not None, "there is no C compiler"
        source = folder / "clock.c"
        source.write_text(_SHIM)
        self._library = folder / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", self._library, source], check=True)

    def off_by(self, seconds: int) -> dict[str, str]:
        """The environment of a process whose clock is fast by so many seconds, or slow where it is negative."""
        return {"LD_PRELOAD": str(self._library), "FASTQ_TEST_CLOCK_SHIFT": str(seconds)}
