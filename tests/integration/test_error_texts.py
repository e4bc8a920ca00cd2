"""What handlers raise, however hostile: each text is stored cleaned and cut, and harms no neighbour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from fastq import TaskInfo
from fastq.outcome import ERROR_LIMIT, TRACEBACK_LIMIT
from tests.support.lab import Lab


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


class Mute(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Exits(Exception):  # noqa: N818
    """Ends the process of whoever asks for its text, if it is let."""

    def __str__(self) -> str:  # noqa: PLE0307
        sys.exit(3)


class NoString(Exception):  # noqa: N818
    def __str__(self) -> Any:
        return 17  # noqa: PLE0307


class Odd(str):
    """A text that is one and behaves as none."""

    __slots__ = ()

    def replace(self, *args: Any) -> NoReturn:
        raise RuntimeError("not to be replaced")

    def encode(self, *args: Any) -> NoReturn:
        raise RuntimeError("not to be encoded")


class OddText(Exception):  # noqa: N818
    def __str__(self) -> str:
        return Odd("an odd text")


class Renamed(Exception):  # noqa: N818
    pass


Renamed.__qualname__ = "a\0name\ud800"


def _raise_cycle() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def _raise_self_cause() -> None:
    error = ValueError("its own cause")
    error.__cause__ = error
    raise error


def _raise_long_chain() -> None:
    error: Exception | None = None
    for n in range(5_000):
        following = ValueError(f"link {n}")
        following.__cause__ = error
        error = following
    assert error is not None
    raise error


def _raise_deep_group() -> None:
    group: Exception = ValueError("innermost")
    for n in range(2_000):
        group = ExceptionGroup(f"level {n}", [group])
    raise group


def _raise_wide_group() -> None:
    raise ExceptionGroup("wide\0", [ValueError("x" * 10_000), Mute(), *(KeyError(f"\ud800{n}") for n in range(5_000))])


def _raise_notes() -> None:
    error = ValueError("with notes")
    error.add_note("n\0" * 5_000_000)
    error.add_note("\udfff")
    raise error


def _raise_from_a_source_of_megabytes() -> None:
    # The line that raised is part of the traceback.
    exec(compile("raise ValueError('" + "long " * 2_000_000 + "')", "a\0file\ud800", "exec"))  # noqa: S102


def _raiser(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


_RAISERS: dict[str, Callable[[], None]] = {
    "nul": _raiser(ValueError("before\0after")),
    "surrogate": _raiser(ValueError("before\ud800after")),
    "huge": _raiser(ValueError("x" * 10_000_000)),
    "mute": _raiser(Mute("a", "b")),
    "exits": _raiser(Exits("a")),
    "no string": _raiser(NoString()),
    "odd text": _raiser(OddText()),
    "cycle": _raise_cycle,
    "self cause": _raise_self_cause,
    "long chain": _raise_long_chain,
    "deep group": _raise_deep_group,
    "wide group": _raise_wide_group,
    "notes": _raise_notes,
    "source": _raise_from_a_source_of_megabytes,
    "own name": _raiser(Renamed("a class with a name of its own")),
    "bytes": _raiser(ValueError(b"\xff\x00")),
    "group of bases": _raiser(BaseExceptionGroup("bases", [KeyboardInterrupt(), SystemExit(1)])),
}


@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_is_raised_is_kept_in_a_form_that_can_be_stored(
    lab: Lab, caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    def handle(task: TaskInfo) -> None:
        if task.payload is not None:
            _RAISERS[task.payload]()

    async def handle_async(task: TaskInfo) -> None:
        handle(task)

    payloads: list[str | None] = [None] * 500
    places = range(7, 500, 27)
    for place, name in zip(places, _RAISERS, strict=False):
        payloads[place] = name
    assert sum(name is not None for name in payloads) == len(_RAISERS)
    lab.consumer(handle_async if is_async else handle)
    ids = lab.enqueue(*payloads, max_attempts=1)
    lab.wait_for(completed=500 - len(_RAISERS), failed=len(_RAISERS))
    kept = {
        id_: (error, traceback) for id_, error, traceback in lab.all("SELECT id, error, traceback FROM attempt_error")
    }
    texts = {payloads[ids.index(id_)]: pair for id_, pair in kept.items()}
    assert texts.keys() == _RAISERS.keys()
    for error, traceback in texts.values():
        assert 0 < len(error.encode()) <= ERROR_LIMIT
        assert 0 < len(traceback.encode()) <= TRACEBACK_LIMIT
    # What can be said of each is said.
    for name, said in {
        "nul": "ValueError: before\ufffdafter",
        "surrogate": "ValueError: before?after",
        "mute": "Mute: (its text can't be had: str() raised RuntimeError)",
        "exits": "Exits: (its text can't be had: str() raised SystemExit)",
        "no string": "NoString: (its text can't be had: str() raised TypeError)",
        "odd text": "OddText: an odd text",
        "self cause": "ValueError: its own cause",
        "own name": "a\ufffdname?: a class with a name of its own",
        "bytes": r"ValueError: b'\xff\x00'",
    }.items():
        assert texts[name][0] == said
    assert "second" in texts["cycle"][1]
    assert "link 4999" in texts["long chain"][1]
    assert texts["deep group"][0].startswith("ExceptionGroup: level 1999")
    assert "bytes left out" in texts["notes"][1]
    assert "can't be stored" not in caplog.text
    assert lab.all("SELECT 1 FROM attempt_error WHERE error LIKE 'its failure could not be stored%'") == []
