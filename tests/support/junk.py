"""Values that callers pass by mistake."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from fastq import FastqError

#: What a call may answer bad input with: an error of its own, or Python's for a wrong type.
CLEAR = (FastqError, TypeError)


class _Odd:
    """An object that says nothing of itself."""

    def __repr__(self) -> str:
        return "<odd>"


async def _coroutine_function() -> None: ...


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    10,
    2**15,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.5,
    0.5,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    Decimal("1.5"),
    1j,
    "",
    "t",
    "10",
    "a\0b",
    "\ud800",
    "é" * 256,
    "%s {} '; --",
    b"",
    b"raw",
    bytearray(b"raw"),
    (),
    ("t",),
    [],
    ["t"],
    [None],
    [1, "t"],
    {},
    {"t": 1},
    {1: object()},
    {"t"},
    iter(()),
    range(3),
    timedelta(seconds=-1),
    timedelta(0),
    timedelta(seconds=3),
    timedelta.max,
    datetime(2030, 1, 1),  # noqa: DTZ001 naive on purpose
    datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
    datetime(2030, 1, 1, tzinfo=UTC),
    _Odd(),
    _Odd,
    object,
    len,
    lambda: None,
    lambda *_: "text",
    _coroutine_function,
    Ellipsis,
)

values = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.datetimes(),
    st.timedeltas(),
    st.lists(st.one_of(st.none(), st.integers(), st.text()), max_size=3),
)
"""What a parameter may be given that wants something else, or something in another range."""


__all__ = ["CLEAR", "ODD", "values"]
