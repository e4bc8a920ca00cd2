"""The primary is gone for good, and its synchronous standby takes over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastq import Producer, Task
from tests.support.faults.failover import StreamingStandby
from tests.support.faults.scene import SCHEMA, Load, Scene
from tests.support.faults.server import PrivateServer
from tests.support.faults.takes import Take, Takes
from tests.support.waiting import wait_until

#: Seconds after the promotion.
_LIMIT = 15.0


def test_work_goes_on_after_a_promotion_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    with PrivateServer() as primary, Scene(primary, tmp_path) as scene:
        _fail_over(scene)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_promotions_lose_nothing_acknowledged(takes: Takes) -> None:
    def take_over(take: Take) -> float:
        with take.scene() as scene:
            return _fail_over(scene, take)

    takes.run("a standby's promotion, until work went on", take_over)


def _fail_over(scene: Scene, take: Take | None = None) -> float:
    """Gives the seconds from the promotion until tasks were enqueued and run again."""
    primary = scene.server
    with StreamingStandby(primary) as standby:
        for _ in range(3):
            scene.worker(standby.dsn_of_both)
        with Load(standby.dsn_of_both) as load:
            load.wait_for_calls(100)
            if take is not None:
                take.wait_for_any_moment()
            primary.kill()
            scene.server = standby
            standby.promote()
            promoted = time.monotonic()
            load.wait_for_calls(10)
            # Its number is none of the load's.
            with Producer(standby.dsn_of_both, schema=SCHEMA) as producer:
                late = producer.enqueue(Task("t", {"n": -1})).id
            ends = wait_until(
                lambda: [entry.at for entry in scene.journal.entries("end", after=promoted) if entry.id == late],
                timeout=60,
                message="a task to run that was enqueued after the promotion",
            )
            took = ends[0] - promoted
            load.wait_for_calls(100)
            promises = load.stop()
        assert took <= _LIMIT
        assert promises.count > 100
        scene.wait_until_drained()
        # Claims and outcomes that were on their way are lost with the primary: such a run may be there twice.
        scene.check_worked(promises, may_repeat=True)
        return took
