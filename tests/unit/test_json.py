"""The encoder of payloads, against the standard library's."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
import threading
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq._engine import encode_json
from fastq.errors import PayloadError

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(_VALUES)
def test_reads_back_as_what_it_was(value: Any) -> None:
    encoded = encode_json(value)
    assert json.loads(encoded) == value
    # Types too: 1.0 is not 1, and True is neither.
    assert repr(json.loads(encoded)) == repr(json.loads(json.dumps(value)))


@given(st.text() | st.integers() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers()))
def test_is_the_standard_librarys_compact_utf8(value: Any) -> None:
    expected = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # \u007f needs no escape, and control characters have one form.
    assert encode_json(value) == expected.encode()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(value: float) -> None:
    back = json.loads(encode_json(value))
    assert isinstance(back, float)
    assert math.copysign(1, back) == math.copysign(1, value)
    assert back == value


def test_escapes_wherever_they_lie() -> None:
    for at in range(40):
        text = "x" * at + '"\\\n\r\t\b\f\x00\x1f' + "é" * (40 - at)
        assert json.loads(encode_json(text)) == text


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


Point = namedtuple("Point", "x y")  # noqa: PYI024 the plain one is what is meant


class Real(float):
    def __repr__(self) -> str:
        return "no number"


def test_subclasses_count_as_what_they_are_made_of() -> None:
    value = {
        "a": Colour.RED,
        Colour.RED: Level.HIGH,
        "p": Point(1, 2),
        "o": OrderedDict(b=1),
        "f": Real(1.5),
        "n": Level(3),
    }
    assert encode_json(value) == b'{"a":"red","red":3,"p":[1,2],"o":{"b":1},"f":1.5,"n":3}'


def test_containers_may_be_empty() -> None:
    assert encode_json({"a": [], "b": {}, "c": ()}) == b'{"a":[],"b":{},"c":[]}'


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"items": [0, 1, 2, {"when": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}]},
            "payload.items[3].when: datetime can't be encoded",
        ),
        (object(), "payload: object can't be encoded"),
        ({"a": {1, 2}}, "payload.a: set can't be encoded"),
        ({"a b": b"x"}, 'payload["a b"]: bytes can\'t be encoded'),
        ([math.nan], r"payload[0]: NaN is not a number that JSON has"),
        ([1, -math.inf], r"payload[1]: infinity is not a number that JSON has"),
        ({"a": {1: 2}}, "payload.a: a key is int, but JSON has only str"),
        ({None: 2}, "payload: a key is NoneType"),
        ({True: 2}, "payload: a key is bool"),
        ({"t": "\ud800"}, "payload.t: a str holds a lone surrogate"),
        ({"\ud800": 1}, "payload: a str holds a lone surrogate"),
        (10**5000, "payload: an int has more digits"),
        (_nested(201), "more than 200 containers inside each other"),
        (_CYCLE, "or one that holds itself"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "value",
)
def test_what_json_has_not_is_refused_with_the_way_to_it(value: Any, message: str) -> None:
    with pytest.raises(PayloadError) as refused:
        encode_json(value)
    assert message in str(refused.value)


def test_two_hundred_containers_are_fine() -> None:
    assert encode_json(_nested(200)) == b"[" * 200 + b"]" * 200


def test_depth_is_safe_on_a_small_stack() -> None:
    outcomes: list[bytes] = []
    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: outcomes.append(encode_json(_nested(200))))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert len(outcomes) == 1
