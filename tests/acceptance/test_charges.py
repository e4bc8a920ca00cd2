"""What a rescue charges."""

from __future__ import annotations

from tests.acceptance.stage import Stage


def test_a_run_that_ended_is_not_charged_to_the_next_one_that_never_began(stage: Stage) -> None:
    """Named by a heartbeat, it failed, was retried at once, claimed again by the same worker, and lost before it started."""
    case = stage.case("running")
    case.worker.beat(case.ids)
    [no] = case.held
    assert case.worker.fail(no, case.ids, 0.0) == []
    stage.leader.one("promote_tasks", 1000, 0)
    assert case.worker.claim(3, [case.lane])
    stage.leader.declare_dead(case.worker)
    stage.leader.rescue()
    record = stage.looker.get_task(case.id)
    assert (record.state, record.kind) == ("pending", None)
    assert record.attempts == 1
