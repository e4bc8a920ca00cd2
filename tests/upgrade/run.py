"""The upgrade run: an older fastq works under load, `fastq migrate` of this one runs beneath it, new workers and producers join, the old
ones leave; then the account of every task, as after a chaos run.

The older one is a commit, UPGRADE_FROM, built into target/upgrade.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psycopg

from fastq import migrations
from tests.chaos.audit import Account, audit, prepare
from tests.chaos.load import Producers, Workers
from tests.support.faults.journal import Journal
from tests.support.faults.server import PrivateServer
from tests.support.report import Row, show
from tests.support.waiting import wait_until

_ROOT: Final = Path(__file__).parents[2]
_SCHEMA: Final = "fastq"
#: Seconds of each of the three parts: old ones alone, both, new ones alone.
_SECONDS: Final = 15.0
#: Tokens that are there before: their new index is one of a large table.
_TOKENS: Final = 300_000
_OLD_KINDS: Final = ("single", "bulk", "token")
#: Between two looks of who measures how long the migration makes others wait.
_LOOK: Final = 0.005
_TABLES: Final = ("task", "ready", "claim", "done", "delayed", "dead", "token", "consumer")
_LEFT: Final = (
    "SELECT (SELECT coalesce(sum(hi - lo + 1), 0) FROM fastq.ready) + (SELECT count(*) FROM fastq.claim) "
    "+ (SELECT count(*) FROM fastq.delayed)"
)


def build(commit: str) -> Path:
    """The package of that commit, with its engine."""
    folder = _ROOT / "target" / "upgrade" / commit
    package = folder / "python"
    library = package / "fastq" / "_core.abi3.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], cwd=_ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
        env = {**os.environ, "CARGO_TARGET_DIR": str(folder / "target"), "PYO3_PYTHON": sys.executable}
        subprocess.run(
            ["cargo", "build", "--release", "--locked", "--features", "python"], cwd=folder, env=env, check=True
        )
        shutil.copy(folder / "target" / "release" / "lib_core.so", library)
    return package


class Waits:
    """How long somebody who looks at a table again and again is made to wait: a writer's lock, taken and given back."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.longest = dict.fromkeys(_TABLES, 0.0)
        """Seconds, by table."""

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Meanwhile."""
        over = threading.Event()
        threads = [threading.Thread(target=self._look, args=(table, over)) for table in _TABLES]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _look(self, table: str, over: threading.Event) -> None:
        with psycopg.connect(self._dsn) as db:
            while not over.wait(_LOOK):
                began = time.monotonic()
                db.execute(f"LOCK TABLE {_SCHEMA}.{table} IN ROW EXCLUSIVE MODE")
                self.longest[table] = max(self.longest[table], time.monotonic() - began)
                db.rollback()


def _pass_time(workers: list[Workers]) -> None:
    """All of them work on for a while; none ends."""
    until = time.monotonic() + _SECONDS

    def is_over() -> bool:
        for each in workers:
            each.check()
        return time.monotonic() > until

    wait_until(is_over, timeout=2 * _SECONDS)


def _completed(workers: Workers) -> int:
    return sum(int(worker.stats["completed"]) for worker in workers.all)


def run(commit: str, folder: Path) -> bool:
    """The whole run. Prints the account; gives whether all was well."""
    env = {"PYTHONPATH": str(build(commit))}
    print(f"upgrade from {commit}; files in {folder}", flush=True)
    with ExitStack() as stack:
        server = stack.enter_context(PrivateServer())
        command = [sys.executable, "-m", "fastq", "migrate", "--dsn", server.dsn]
        subprocess.run(command, env={**os.environ, **env}, check=True)
        prepare(server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as db:
            tokens = "INSERT INTO fastq.token (type, token, id) SELECT 'before', 'token ' || n, -n FROM generate_series(1, %s) n"
            db.execute(tokens, [_TOKENS])
        before = migrations.status(server.dsn).version
        journal = Journal(folder / "journal")
        old = Workers(server.dsn, _SCHEMA, folder, journal, number=2, name="old", env=env)
        stack.callback(old.close)
        old_producers = Producers(server.dsn, _SCHEMA, folder, "old", kinds=_OLD_KINDS, is_varied=False, env=env)
        stack.callback(old_producers.close)
        _pass_time([old])
        waits = Waits(server.dsn)
        with waits.measured():
            began = time.monotonic()
            applied = migrations.migrate(server.dsn)
            took = time.monotonic() - began
        new = Workers(server.dsn, _SCHEMA, folder, journal, number=2, name="new")
        stack.callback(new.close)
        new_producers = Producers(server.dsn, _SCHEMA, folder, "new", is_varied=False)
        stack.callback(new_producers.close)
        _pass_time([old, new])
        old_producers.stop()
        old.check()
        old.stop()
        _pass_time([new])
        new_producers.stop()
        with psycopg.connect(server.dsn, autocommit=True) as db:
            wait_until(lambda: db.execute(_LEFT).fetchone() == (0,), timeout=120, message="the end of all tasks")
        new.check()
        new.stop()
        logs = f"{old.logs()}\n{new.logs()}"
        account = audit(server.dsn, journal.path, old_producers.files + new_producers.files, [], logs)
    said = re.findall(r"^(?:WARNING|ERROR|CRITICAL) (?!fastq\.handler).*$", logs, re.MULTILINE)
    steps = f"{before} to {applied[-1].version if applied else before} in {took:.2f} s"
    return _report(account, steps, waits, (_completed(old), _completed(new)), said)


def _report(account: Account, steps: str, waits: Waits, by: tuple[int, int], said: list[str]) -> bool:
    longest = ", ".join(f"{table} {seconds * 1e3:.0f}" for table, seconds in waits.longest.items())
    rows: list[Row] = [
        ("steps of the schema, under load", steps, True),
        ("a writer's longest wait meanwhile, ms", longest, True),
        ("tasks acknowledged", f"{account.acknowledged:,}", account.acknowledged > 0),
        ("tasks completed", f"{account.completed:,}", account.completed >= account.acknowledged),
        ("by old workers, by new ones", f"{by[0]:,}, {by[1]:,}", min(by) > 0),
        ("starts", f"{account.starts:,}", True),
        ("runs that failed as ordered", f"{account.failures:,}", account.failures > 0),
        ("runs lost and run again", f"{account.reruns:,}", account.reruns == 0),
        *account.wrong,
        *(("WRONG: a worker said", line, False) for line in said[:10]),
    ]
    return show(rows, "old and new ones did it together, and each task once")


def main() -> None:
    """Runs by UPGRADE_FROM; the exit status is 1 where anything was wrong. Then the files stay."""
    commit = os.environ["UPGRADE_FROM"]
    folder = Path(tempfile.mkdtemp(prefix="fastq-upgrade-"))
    is_well = run(commit, folder)
    if is_well:
        shutil.rmtree(folder)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
