"""The parts of a benchmark that need no database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import replace
from types import FrameType

import pytest
from psycopg.conninfo import conninfo_to_dict

from fastq._engine import encode_json
from fastq.bench import FIGURES, BenchError, Drain, Result, Stopped
from fastq.bench._handlers import bare_loop
from fastq.bench._load import Looks
from fastq.bench._loops import run_coroutine
from fastq.bench._meter import Reading, usage
from fastq.bench._processes import cpu_seconds, is_here, memory_bytes
from fastq.bench._result import percentile
from fastq.bench._server import Server
from fastq.bench._session import named
from fastq.bench._stopping import StopSignals, surely
from fastq.bench._tasks import TaskMaker
from fastq.bench._waiting import wait_for
from fastq.errors import SettingsError

_SERVER = Server(
    "18.6",
    is_embedded=True,
    is_superuser=False,
    settings={"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"},
)


@pytest.mark.parametrize("size", [26, 70, 1_048_576])
def test_payloads_have_the_size_that_is_asked_for_and_differ(size: int) -> None:
    maker = TaskMaker(size)
    tasks = [*maker.stream(3), maker.make()]
    payloads = {encode_json(task.payload) for task in tasks}
    assert len(payloads) == 4
    assert {len(payload) for payload in payloads} == {size}
    assert {task.idempotency_token for task in tasks} == {None}


def test_each_task_has_a_token_of_its_own_if_asked() -> None:
    maker = TaskMaker(tokens=True)
    assert len({task.idempotency_token for task in [*maker.stream(3), maker.make()]} - {None}) == 4


@pytest.mark.parametrize("size", [-1, 25, 1_048_577])
def test_a_payload_that_cannot_be_made_is_refused(size: int) -> None:
    with pytest.raises(SettingsError, match="payload_bytes"):
        TaskMaker(size)


@pytest.mark.parametrize(
    "dsn",
    [
        "host=h dbname=d",
        "host=h application_name=mine",
        "postgresql://u:p@h/d",
        "postgresql://h?application_name=mine",
        "postgresql://",
    ],
)
def test_sessions_bear_the_name_whatever_the_dsn_says(dsn: str) -> None:
    before, after = conninfo_to_dict(dsn), conninfo_to_dict(named(dsn, "bench"))
    assert after == before | {"application_name": "bench"}


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_usage_is_of_each_task_and_unknown_stays_unknown() -> None:
    before, after = Reading(1.0, 2.0, 0.5, 1_000), Reading(3.0, 2.5, 0.5, 3_000)
    assert usage(before, after, 1_000) == {
        "client_cpu_us": 2_000.0,
        "server_cpu_us": 500.0,
        "server_other_cpu_us": 0.0,
        "wal_bytes": 2.0,
    }
    unknown = usage(before, replace(after, server_cpu=None, wal_bytes=None), 1_000)
    assert (unknown["server_cpu_us"], unknown["wal_bytes"]) == (None, None)


def test_a_result_has_every_figure_and_no_connection_string() -> None:
    found = Result("drain", {"tasks": 3, "tasks_per_s": 2 / 3, "of_bare": 1.0}, {"handler": "sync"}, _SERVER).to_json()
    assert set(FIGURES) <= found.keys()
    assert (found["tasks"], found["tasks_per_s"], found["of_bare"], found["p99_ms"]) == (3, 0.666667, 1, None)
    assert found["notes"] == []
    assert found["versions"].keys() == {"fastq", "python", "postgresql"}
    assert "dsn" not in json.dumps(found)


def test_a_server_that_may_lose_commits_is_named() -> None:
    server = replace(_SERVER, settings=_SERVER.settings | {"fsync": "off"})
    [note] = Result("drain", {}, {}, server).to_json()["notes"]
    assert note.startswith("fsync is off")


def test_rates_are_between_the_looks_next_to_the_times() -> None:
    looks = Looks()
    for at in range(10):
        looks.add(float(at), at * 100, 50 - at)
    assert looks.rate(2.0, 8.0) == 100.0
    assert looks.rate(1.5, 8.4) == 100.0
    assert looks.backlog(3.0, 5.0) == [47, 46, 45]
    with pytest.raises(BenchError, match="too short"):
        looks.rate(3.1, 3.9)


def test_waiting_ends_when_it_is_done_and_when_nothing_comes() -> None:
    counts = iter([0, 5, 5, 9, 10, 10])
    began = time.perf_counter()
    assert wait_for("work", lambda: next(counts), 10) >= began
    with pytest.raises(BenchError, match=r"work: stopped at 3 of 10; nothing more came for 0\.05 s"):
        wait_for("work", lambda: 3, 10, stall=0.05)


def test_as_many_tasks_as_take_ten_seconds_where_handlers_sleep() -> None:
    assert Drain()._count() == 1_000_000
    assert Drain(work_ms=1, concurrency=16)._count() == 160_000
    assert Drain(work_ms=60_000, concurrency=4)._count() == 4
    assert Drain(work_ms=1, tasks=7)._count() == 7
    with pytest.raises(SettingsError, match="work_ms"):
        Drain(work_ms=-1)._count()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_bare_loop_runs_the_handlers_side_by_side(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("fastq.bench._handlers._BARE_SECONDS", 0.2)
    count, seconds = bare_loop("async" if kind == "async" else "sync", 0.02, 8)
    assert seconds >= 0.2
    # Each of the eight sleeps 20 ms at a time; one alone would come to ten.
    assert 16 <= count <= seconds / 0.02 * 8


def test_the_first_signal_stops_and_later_ones_do_not_disturb_the_clean_up() -> None:
    steps = []

    def clean_up() -> None:
        signal.raise_signal(signal.SIGTERM)
        steps.append("cleaned")

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            surely(clean_up)

    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        with pytest.raises(Stopped, match="SIGINT") as stopped:
            work()
        assert stopped.value.signal == signal.SIGINT
    assert steps == ["cleaned"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_in_the_clean_up_lets_it_end_first() -> None:
    steps = []

    def clean_up() -> None:
        steps.append("begun")
        signal.raise_signal(signal.SIGTERM)
        steps.append("cleaned")

    with StopSignals(), pytest.raises(Stopped, match="SIGTERM"):
        surely(clean_up)
    assert steps == ["begun", "begun", "cleaned"]


def test_an_ignored_signal_stays_ignored() -> None:
    def mine(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")  # noqa: PTH110 - where it is, it is Linux
def test_processes_are_read_from_proc() -> None:
    used = cpu_seconds(os.getpid())
    assert used is not None
    assert used > 0
    resident, peak = memory_bytes(os.getpid()), memory_bytes(os.getpid(), peak=True)
    assert resident is not None
    assert peak is not None
    assert 1_000_000 < resident <= peak
    # A process of that number is here, but it is no server.
    assert not is_here(os.getpid(), 1.0)
    # Above what a process can be numbered.
    assert (cpu_seconds(2**30), memory_bytes(2**30), is_here(2**30, 1.0)) == (None, None, False)


def test_a_signal_while_a_coroutine_is_being_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    start = threading.Thread.start

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert begun.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(threading.Thread, "start", start_and_be_interrupted)
    with StopSignals(), pytest.raises(Stopped):
        run_coroutine(work)
    assert ended.is_set()


def test_a_coroutine_runs_beside_the_main_thread_and_ends_with_it() -> None:
    ended = []

    async def answer() -> int:
        return 7

    async def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def fail() -> None:
        raise ZeroDivisionError

    assert run_coroutine(answer) == 7
    with pytest.raises(ZeroDivisionError):
        run_coroutine(fail)
    with StopSignals(), pytest.raises(Stopped):
        run_coroutine(wait)
    assert ended == ["cancelled"]
