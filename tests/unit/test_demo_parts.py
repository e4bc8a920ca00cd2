"""The demo's parts that need no database: its file, its run logs, its service."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from fastq.cli._lines import read_lines
from fastq.demo.load import read_plan, write_file
from fastq.demo.runlog import RunLog, State, read_runs
from fastq.demo.service import BUSY, Service
from fastq.demo.tasks import app, fingerprint


def test_the_file_is_one_for_enqueue(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    seen: list[int] = []
    write_file(path, 2000, seen.append)
    assert seen[-1] == 2000
    with path.open("rb") as file:
        lines = list(read_lines(file))
    assert [line.error for line in lines] == [None] * 2000
    payloads = [line.task.payload for line in lines if line.task is not None]
    assert [payload["line"] for payload in payloads] == list(range(1, 2001))
    assert {line.task.type for line in lines if line.task is not None} == set(app.types)


def test_the_plan_has_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    write_file(path, 2000, lambda _: None)
    plan = read_plan(path)
    kinds = Counter((planned.type, planned.completes, planned.runs) for planned in plan)
    assert kinds["text:digest", True, 1] == 1400
    assert kinds["net:echo", True, 1] == 500
    assert sum(count for (type_, *_), count in kinds.items() if type_ == "mail:deliver") == 100
    assert kinds["mail:deliver", True, 2] > 0
    assert kinds["mail:deliver", True, 3] > 0
    assert kinds["mail:deliver", False, 4] > 0
    first = json.loads(path.read_text().splitlines()[0])
    assert plan[0].result == fingerprint(first["payload"]["text"])


def test_runs_are_written_down(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10)
    with log.record(3) as record:
        record.result = 2**64 - 1
    with pytest.raises(KeyError), log.record(4):
        raise KeyError
    with log.record(5):
        # Read while it is under way, as after a kill.
        [runs] = read_runs(tmp_path).values()
    assert [(run.line, run.state, run.result) for run in runs] == [
        (3, State.RETURNED, 2**64 - 1),
        (4, State.RAISED, 0),
        (5, State.STARTED, 0),
    ]
    assert all(run.started_at <= run.ended_at for run in runs[:2])


def test_threads_share_a_run_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 8000)

    def work(first: int) -> None:
        for line in range(first, first + 1000):
            with log.record(line) as record:
                record.result = line

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [runs] = read_runs(tmp_path).values()
    assert sorted(run.line for run in runs) == list(range(8000))
    assert all(run.result == run.line and run.state == State.RETURNED for run in runs)


_KILLED = """
import os, signal, sys
from pathlib import Path
from fastq.demo.runlog import RunLog
log = RunLog(Path(sys.argv[1]), 1000)
for line in range(500):
    with log.record(line):
        pass
with log.record(500):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_takes_nothing_of_what_was_written_down(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    [runs] = read_runs(tmp_path).values()
    assert [run.line for run in runs] == list(range(501))
    assert [run.state for run in runs] == [State.RETURNED] * 500 + [State.STARTED]


def test_the_run_log_says_when_it_is_full(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1)
    with log.record(1):
        pass
    with pytest.raises(Exception, match="buffer"), log.record(2):
        raise AssertionError("a run that is not on record must not happen")
    assert os.listdir(tmp_path) == [f"runs-{os.getpid()}.bin"]  # noqa: PTH208


def test_the_service_answers() -> None:
    with Service(0.001) as service, socket.create_connection((service.host, service.port), timeout=10) as connection:
        answers = connection.makefile("rb")
        connection.sendall(b"echo two wor")
        connection.sendall(b"ds\ndeliver 5 2\ndeliver 5 2\n")
        # An echo takes its time, so the others come first.
        assert [answers.readline() for _ in range(3)] == [BUSY + b"\n", BUSY + b"\n", b"two words\n"]
        connection.sendall(b"deliver 5 2\ndeliver 6 0\nwhat\n")
        assert [answers.readline() for _ in range(3)] == [b"ok\n", b"ok\n", b"unknown\n"]
        answers.close()
