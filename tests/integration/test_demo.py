"""``fastq demo``, small: what it says of a good run and of one that lost tasks, and what it leaves behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.support.waiting import wait_until


class Demo:
    """A demo under way, in a process group of its own."""

    def __init__(self, dsn: str, folder: Path, tasks: int) -> None:
        self.folder = folder
        self._connection = psycopg.connect(dsn, autocommit=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastq", "demo", "--tasks", str(tasks), "--json", "--dsn", dsn],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self.said = ""
        self.schema = ""
        for line in self.process.stderr:
            self.said += line
            if match := re.search(r"schema (fastq_demo_\w+)", line):
                self.schema = match[1]
                break
        assert self.schema, self.said

    def end(self) -> int:
        """Waits for its end; `said` and `answered` then hold all of it."""
        self.answered, rest = self.process.communicate(timeout=100)
        self.said += rest
        return self.process.returncode

    def query(self, text: LiteralString) -> list[tuple[Any, ...]]:
        """A statement in its schema; none of it while its tables are not there."""
        with contextlib.suppress(psycopg.errors.UndefinedTable), self._connection.transaction():
            self._connection.execute("SELECT set_config('search_path', %s, true)", [self.schema])
            return self._connection.execute(text).fetchall()
        return []

    def has_schema(self) -> bool:
        return bool(self._connection.execute("SELECT to_regnamespace(%s)", [self.schema]).fetchone() != (None,))

    def workers(self) -> list[int]:
        """The process ids of its workers that the database knows."""
        return [pid for (pid,) in self.query("SELECT pid FROM consumer")]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        self._connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(self.schema)))
        self._connection.close()


@pytest.fixture
def demo(request: pytest.FixtureRequest, dsn: str, tmp_path: Path) -> Iterator[Demo]:
    started = Demo(dsn, tmp_path, request.param)
    yield started
    started.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# So many that a kill half-way is one in the middle of work: a look at the tables takes as long as some thousand tasks.
@pytest.mark.parametrize("demo", [40_000], indirect=True)
def test_demo_ends_well(demo: Demo) -> None:
    assert demo.end() == 0, demo.said
    report = json.loads(demo.answered)
    assert report["ok"] is True
    assert report["lost"] == 0
    assert report["problems"] == {}
    types = report["types"]
    assert {name: each["lines"] for name, each in types.items()} == {
        "text:digest": 28_000,
        "net:echo": 10_000,
        "mail:deliver": 2000,
    }
    assert sum(each["completed"] + each["failed"] for each in types.values()) == 40_000
    # As many failures and retries as the file has them in it.
    assert types["mail:deliver"]["failed"] > 0
    assert types["mail:deliver"]["retries"] > types["mail:deliver"]["failed"]
    assert sum(each["runs"] for each in types.values()) == 40_000 + sum(
        each["retries"] + each["reruns"] for each in types.values()
    )
    kill = report["kill"]
    assert kill["held"] > 0, "the kill came when there was nothing to rescue"
    assert kill["run_again"] == kill["held"] == kill["cut_off"] + kill["untold"] + kill["ahead"]
    assert "SIGKILL to worker" in demo.said
    assert "none lost" in demo.said
    # Nothing is left behind.
    assert not demo.has_schema()
    assert list(demo.folder.iterdir()) == []


@pytest.mark.parametrize("demo", [1000], indirect=True)
def test_demo_sees_what_was_lost(demo: Demo) -> None:
    def lose_a_chunk() -> list[tuple[Any, ...]]:
        return demo.query("DELETE FROM ready WHERE rid = (SELECT max(rid) FROM ready) RETURNING hi - lo + 1")

    [(lost,)] = wait_until(lose_a_chunk, timeout=30, message="tasks to lose")
    assert demo.end() == 1, demo.said
    assert demo.answered, demo.said
    report = json.loads(demo.answered)
    assert report["ok"] is False
    assert report["lost"] == lost
    [(problem, where)] = report["problems"].items()
    assert problem == "there is no task in the tables"
    assert where["lines"] == lost
    assert f"{lost:,} lost" in demo.said
    # The evidence is kept, and the demo says where.
    [folder] = demo.folder.iterdir()
    assert str(folder) in demo.said
    assert {path.name for path in folder.iterdir()} >= {"tasks.jsonl", "worker-1.log", "worker-2.log"}
    assert demo.has_schema()


@pytest.mark.parametrize("demo", [50_000], indirect=True)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_demo_stops_what_it_started(demo: Demo, how: signal.Signals) -> None:
    workers = wait_until(lambda: len(pids := demo.workers()) == 2 and pids, timeout=60, message="both workers at work")
    assert workers
    os.kill(demo.process.pid, how)
    assert demo.end() not in (0, None)
    assert not any(is_running(pid) for pid in workers)
    assert not demo.has_schema()
    assert list(demo.folder.iterdir()) == []


@pytest.mark.parametrize("demo", [50_000], indirect=True)
def test_workers_end_with_a_demo_that_is_killed(demo: Demo) -> None:
    workers = wait_until(lambda: len(pids := demo.workers()) == 2 and pids, timeout=60, message="both workers at work")
    assert workers
    demo.process.kill()
    demo.end()
    # They stop in order, and sign off.
    wait_until(lambda: demo.workers() == [], timeout=40, message="the end of both workers")
