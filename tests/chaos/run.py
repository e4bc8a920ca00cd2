"""The chaos run: producers, four workers, and everything that goes wrong in production, for as long as is asked; then the account."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psycopg

from fastq.migrations import migrate
from tests.chaos.audit import Account, audit, prepare
from tests.chaos.faults import Faults
from tests.chaos.load import KINDS, WORKERS, Producers, Workers
from tests.support.faults.journal import Journal
from tests.support.faults.server import PrivateServer
from tests.support.report import Row, show
from tests.support.waiting import wait_until

#: Tasks a second, over the whole run with all that struck.
LEAST_RATE: Final = 300.0
_SECONDS: Final = 1800.0
#: Seconds after the last fault in which all that is left must be done.
_DRAIN: Final = 180.0
_LEFT: Final = (
    "SELECT (SELECT coalesce(sum(hi - lo + 1), 0) FROM fastq.ready) + (SELECT count(*) FROM fastq.claim) "
    "+ (SELECT count(*) FROM fastq.delayed)"
)


class Stage:
    """A server, workers and producers of our own; what faults strike at."""

    schema: Final = "fastq"

    def __init__(self, folder: Path, seed: str) -> None:
        self._stack = ExitStack()
        try:
            self.server = self._stack.enter_context(PrivateServer())
            migrate(self.server.dsn, schema=self.schema)
            prepare(self.server.dsn)
            self.journal = Journal(folder / "journal")
            self.workers = Workers(self.server.dsn, self.schema, folder, self.journal)
            self._stack.callback(self.workers.close)
            self.producers = Producers(self.server.dsn, self.schema, folder, seed)
            self._stack.callback(self.producers.close)
        except BaseException:
            self._stack.close()
            raise

    @property
    def left(self) -> int:
        """Tasks that wait or run."""
        with psycopg.connect(self.server.dsn, autocommit=True, connect_timeout=5) as db:
            row = db.execute(_LEFT).fetchone()
            return int(row[0]) if row else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()


def run(seconds: float, seed: str, folder: Path) -> bool:
    """The whole run. Prints the account; gives whether all was well."""
    print(f"chaos for {seconds:g} s with CHAOS_SEED={seed}; files in {folder}", flush=True)
    with Stage(folder, seed) as stage:
        faults = Faults(stage, seed)
        began = time.monotonic()
        with faults.striking():
            next_line = began + 60
            while (now := time.monotonic()) < began + seconds:
                wait_until(lambda: time.monotonic() > min(now + 1, began + seconds), timeout=10)
                faults.check()
                if now >= next_line:
                    next_line += 60
                    print(f"{now - began:6.0f} s: {sum(faults.counts.values())} faults", flush=True)
        faults.check()
        took = time.monotonic() - began
        stage.producers.stop()
        wait_until(lambda: stage.left == 0, timeout=_DRAIN, message="the end of all tasks")
        drained = time.monotonic() - began
        stage.workers.check()
        stage.workers.stop()
        account = audit(
            stage.server.dsn, stage.journal.path, stage.producers.files, faults.struck, stage.workers.logs()
        )
    return _report(account, faults.counts, took, drained)


def _report(account: Account, faults: dict[str, int], took: float, drained: float) -> bool:
    rate = account.completed / drained
    rows: list[Row] = [
        ("seconds with faults, until all was done", f"{took:.0f}, {drained:.0f}", True),
        ("processes", f"{WORKERS} workers, {len(KINDS)} producers", True),
        ("tasks acknowledged", f"{account.acknowledged:,}", account.acknowledged > 0),
        ("tasks completed", f"{account.completed:,}", account.completed >= account.acknowledged),
        (f"tasks a second, at least {LEAST_RATE:g}", f"{rate:.0f}", rate >= LEAST_RATE),
        ("starts", f"{account.starts:,}", True),
        ("runs that failed as ordered", f"{account.failures:,}", True),
        ("runs lost by a fault, and run again", f"{account.reruns:,}", account.reruns > 0),
        ("tasks completed in their handlers' transactions", f"{account.effects:,}", account.effects > 0),
        ("such transactions broken, and begun again", f"{account.breaks:,}", account.breaks > 0),
        ("tasks with a timeout and retry policy of their own", f"{account.options:,}", account.options > 0),
        ("of these: runs that failed", f"{account.option_failures:,}", account.option_failures > 0),
        ("of these: runs lost by a fault, and run again", f"{account.option_reruns:,}", True),
        *((f"fault: {kind}", str(count), count > 0) for kind, count in faults.items()),
        *account.wrong,
    ]
    return show(rows, "nothing lost, nothing completed twice, every re-run explained")


def main() -> None:
    """Runs by CHAOS_SECONDS and CHAOS_SEED; the exit status is 1 where anything was wrong. Then the files stay."""
    seconds = float(os.environ.get("CHAOS_SECONDS") or _SECONDS)
    seed = os.environ.get("CHAOS_SEED") or secrets.token_hex(4)
    folder = Path(tempfile.mkdtemp(prefix="fastq-chaos-"))
    is_well = run(seconds, seed, folder)
    if is_well:
        shutil.rmtree(folder)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
