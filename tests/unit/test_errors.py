"""The error tree: what catches what, and what each carries."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import pytest

from fastq import TaskRecord, errors


@pytest.mark.parametrize("name", errors.__all__)
def test_all_are_fastq_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.FastqError)


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (errors.SettingsError, ValueError),
        (errors.ConnectionLost, errors.DatabaseError),
        (errors.SchemaError, errors.DatabaseError),
        (errors.PayloadError, errors.EnqueueError),
        (errors.TaskNotFound, errors.TaskError),
        (errors.InvalidTransition, errors.TaskError),
        (errors.TaskFailed, errors.TaskError),
        (errors.ResultNotKept, errors.TaskError),
        (errors.ResultError, errors.TaskError),
    ],
)
def test_branches(child: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(child, parent)


def test_a_database_error_carries_the_servers_code() -> None:
    error = errors.DatabaseError("deadlock", sqlstate="40P01", is_transient=True)
    assert (error.sqlstate, error.is_transient) == ("40P01", True)
    assert errors.DatabaseError("no server").sqlstate is None
    assert not errors.DatabaseError("no server").is_transient


def test_a_lost_connection_is_transient_and_may_be_in_doubt() -> None:
    error = errors.ConnectionLost("cut", in_doubt=True)
    assert error.is_transient
    assert error.in_doubt
    assert not errors.ConnectionLost("cut").in_doubt


def test_an_enqueue_error_names_the_task() -> None:
    assert str(errors.PayloadError("too big", index=7)) == "task 7: too big"
    assert str(errors.PayloadError("too big")) == "too big"


@pytest.mark.parametrize(
    "error",
    [
        errors.ConnectionLost("cut", in_doubt=True, sqlstate="57P01"),
        errors.DatabaseError("no", sqlstate="42501"),
        errors.PayloadError("too big", index=7, committed=3),
        errors.SettingsError("bad"),
    ],
)
def test_errors_cross_processes_whole(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", [errors.InvalidTransition, errors.TaskFailed, errors.ResultNotKept])
def test_an_error_about_a_state_carries_the_task_across_processes(
    kind: type[errors.InvalidTransition | errors.TaskFailed | errors.ResultNotKept],
) -> None:
    task = TaskRecord(
        id=7,
        type="t",
        queue="q",
        priority=0,
        payload={"a": [1]},
        state="running",
        kind=None,
        attempts=1,
        max_attempts=3,
        created_at=datetime.now(UTC),
        run_at=None,
        ended_at=None,
        errors=(),
    )
    copy = pickle.loads(pickle.dumps(kind("task 7 runs", task)))  # noqa: S301 - our own
    assert (type(copy), str(copy), copy.task) == (kind, "task 7 runs", task)
