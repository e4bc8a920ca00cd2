"""A network between the workers and PostgreSQL that stops, swallows, delays and resets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.network import Proxy
from tests.support.faults.scene import Load, Scene, pass_time
from tests.support.faults.server import PrivateServer
from tests.support.faults.takes import Take, Takes
from tests.support.waiting import wait_until


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with PrivateServer() as server, Scene(server, tmp_path) as scene:
        yield scene


@pytest.fixture
def proxy(scene: Scene) -> Iterator[Proxy]:
    with Proxy(scene.server.dsn) as proxy:
        yield proxy


def _work_through(scene: Scene, proxy: Proxy, *, workers: int = 2) -> Load:
    for _ in range(workers):
        scene.worker(proxy.dsn)
    load = Load(scene.server.dsn)
    load.wait_for_calls(30)
    return load


def _finish(scene: Scene, load: Load, *, timeout: float = 60.0) -> None:
    load.wait_for_calls(30)
    promises = load.stop()
    assert promises.errors == []
    scene.wait_until_drained(timeout=timeout)
    scene.check_worked(promises)


def test_links_that_stand_still_for_a_moment_cost_nothing(scene: Scene, proxy: Proxy) -> None:
    with _work_through(scene, proxy) as load:
        made = proxy.connections
        proxy.hold()
        pass_time(2)
        proxy.flow()
        _finish(scene, load)
    assert proxy.connections == made, "a connection that was alive was given up"
    assert [scene.complaints(worker) for worker in scene.workers] == [[], []]


@pytest.mark.parametrize("fault", ["cut", "reset", "half_close"])
def test_links_that_end_one_way_or_the_other_are_made_anew(scene: Scene, proxy: Proxy, fault: str) -> None:
    with _work_through(scene, proxy) as load:
        for _ in range(3):
            made = proxy.connections
            assert getattr(proxy, fault)() >= 6
            # All three of each worker.
            wait_until(lambda made=made: proxy.connections >= made + 6, timeout=30)  # type: ignore[misc]
        _finish(scene, load)


def test_slow_links_lose_nothing(scene: Scene, proxy: Proxy) -> None:
    with _work_through(scene, proxy) as load:
        proxy.delay(50)
        load.wait_for_calls(100)
        _finish(scene, load)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_twenty_seconds_in_which_nothing_flows_kill_nobody(takes: Takes) -> None:
    takes.run("20 s in which nothing flows", _nothing_flows)


def _nothing_flows(take: Take) -> None:
    with take.scene() as scene, Proxy(scene.server.dsn) as proxy, _work_through(scene, proxy, workers=3) as load:
        take.wait_for_any_moment()
        proxy.hold()
        pass_time(20)
        proxy.flow()
        _finish(scene, load, timeout=90)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_twenty_seconds_in_which_every_byte_is_swallowed_kill_nobody(takes: Takes) -> None:
    takes.run("20 s in which all is swallowed", _swallowed)


def _swallowed(take: Take) -> None:
    with take.scene() as scene, Proxy(scene.server.dsn) as proxy:
        with _work_through(scene, proxy, workers=3) as load:
            take.wait_for_any_moment()
            proxy.swallow()
            pass_time(20)
            proxy.flow()
            # The old connections are silent for ever: that must be found out.
            _finish(scene, load, timeout=120)
        assert proxy.swallowed > 0
        for worker in scene.workers:
            assert "no answer from" in worker.log
            assert len(scene.complaints(worker)) <= 8, scene.complaints(worker)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_producers_too_get_over_twenty_swallowed_seconds(takes: Takes) -> None:
    takes.run("20 s in which all of producers is swallowed", _producers_swallowed)


def _producers_swallowed(take: Take) -> None:
    with take.scene() as scene, Proxy(scene.server.dsn) as proxy:
        scene.worker()
        with Load(proxy.dsn) as load:
            load.wait_for_calls(30)
            take.wait_for_any_moment()
            proxy.swallow(20)
            # A call under way ends within the statement timeout and the time that its doubt may take.
            load.wait_for_calls(30, timeout=120)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises)
