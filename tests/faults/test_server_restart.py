"""PostgreSQL restarts, crashes or stays away while tasks are enqueued and run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq import DatabaseError, Producer, Task
from tests.support.faults.scene import Load, Scene, pass_time, repeats
from tests.support.faults.server import Mode, PrivateServer
from tests.support.faults.takes import Take, Takes
from tests.support.producing import Background


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with PrivateServer() as server, Scene(server, tmp_path) as scene:
        yield scene


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_under_load_loses_nothing_and_charges_nobody(scene: Scene, mode: Mode) -> None:
    _restart(scene, mode)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.parametrize("run", range(repeats()))
def test_restarts_under_load_lose_nothing_and_charge_nobody(scene: Scene, mode: Mode, run: int) -> None:
    _restart(scene, mode)


def _restart(scene: Scene, mode: Mode) -> None:
    for _ in range(2):
        scene.worker()
    with Load(scene.server.dsn) as load:
        load.wait_for_calls(50)
        scene.server.restart(mode)
        load.wait_for_calls(50)
        promises = load.stop()
    assert promises.count > 100
    scene.wait_until_drained()
    scene.check_worked(promises, may_repeat=mode == "immediate")
    if mode == "fast":
        # What the server said before it went was found out, whatever was under way.
        assert promises.errors == []


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_an_outage_of_twenty_seconds_kills_nobody(takes: Takes, mode: Mode) -> None:
    takes.run(f"20 s without a server, stopped {mode}", lambda take: _outage(take, mode))


def _time_until_told(dsn: str) -> float:
    began = time.monotonic()
    with Producer(dsn) as producer, pytest.raises(DatabaseError):
        producer.enqueue(Task("told"))
    return time.monotonic() - began


def _outage(take: Take, mode: Mode) -> None:
    with take.scene() as scene:
        for _ in range(3):
            scene.worker()
        # Twice as long as the time after which a silent worker is dead.
        with Load(scene.server.dsn) as load:
            load.wait_for_calls(50)
            take.wait_for_any_moment()
            scene.server.stop(mode)
            # (Calls of the load may all be in doubt, and are then looked up for 30 s.)
            told = Background(lambda: _time_until_told(scene.server.dsn))
            pass_time(20)
            # Producers are told in time that nobody is there.
            assert told.result(1) < 15
            scene.server.start()
            load.wait_for_calls(50)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises, may_repeat=mode == "immediate")
        for worker in scene.workers:
            complaints = scene.complaints(worker)
            # Claimer, completer and control each say it once, whatever they try meanwhile.
            assert 1 <= len(complaints) <= 6, complaints
            # The server's words, the operating system's ("Connection reset by peer") or the engine's: which came first is said.
            assert any("connect" in line.lower() for line in complaints), complaints


def test_a_crash_amid_enqueues_keeps_each_acknowledged_task_and_doubles_none(scene: Scene) -> None:
    _crash_amid_enqueues(scene, 2)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_crashes_amid_enqueues_keep_each_acknowledged_task_and_double_none(scene: Scene) -> None:
    _crash_amid_enqueues(scene, repeats())


def _crash_amid_enqueues(scene: Scene, times: int) -> None:
    """The same producer goes through all crashes: what it knows of ids and connections was true before each of them."""
    with Load(scene.server.dsn, singles=8, bulks=4, bulk_tasks=2_000, pause=0) as load:
        for _ in range(times):
            load.wait_for_calls(random.randint(5, 100))
            scene.server.restart("immediate")
        load.wait_for_calls(20)
        promises = load.stop()
    ids = scene.check_enqueued(promises)
    assert promises.count >= times
    # In doubt is what could not be found out in time; here the server was back at once.
    assert promises.doubtful == []
    assert len(ids) == promises.count
