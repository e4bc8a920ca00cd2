"""Payloads as models: what JSON holds of them, and what is made of it again."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq import PayloadError, SettingsError, SkipRetry
from fastq._engine import encode_json
from fastq._models import find_load, load_or_skip
from fastq.client import Client

UserId = NewType("UserId", int)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Paint(enum.Enum):
    RED = "red"


@dataclass
class Item:
    name: str
    price: Decimal = Decimal("1.50")


@dataclass(frozen=True)
class Order:
    id: uuid.UUID
    items: list[Item]
    user: UserId
    at: datetime
    day: date
    hour: time
    wait: timedelta
    colour: Colour
    state: Literal["new", "paid"] = "new"
    share: float = 0.5
    note: str | None = None
    pair: tuple[int, str] = (1, "a")
    more: tuple[int, ...] = ()
    tags: frozenset[str] = frozenset()
    prices: Mapping[str, Decimal] = field(default_factory=dict)
    names: Sequence[str] = ()
    anything: Any = None
    weight: Annotated[int, "grams"] = 1
    parts: dict[Colour, Item] = field(default_factory=dict)
    bill: Bill | None = None
    note_of: Note | None = None
    parent: Order | None = None


class Bill(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    total: Decimal = pydantic.Field(alias="sum")
    at: datetime
    lines: tuple[int, ...] = ()


class Note(msgspec.Struct):
    text: str
    at: datetime | None = None


@pydantic.dataclasses.dataclass
class Checked:
    n: int


AT = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
ORDER = Order(
    id=uuid.UUID(int=7),
    items=[Item("a"), Item("b", Decimal("0.10"))],
    user=UserId(5),
    at=AT,
    day=date(2026, 1, 2),
    hour=time(3, 4),
    wait=timedelta(seconds=1.5),
    colour=Colour.BLUE,
    tags=frozenset({"x"}),
    prices={"a": Decimal("1.1")},
    names=["n"],
    anything={"k": [1]},
    parts={Colour.RED: Item("c")},
    more=(1, 2),
    bill=Bill(sum=Decimal("9.99"), at=AT, lines=(1, 2)),
    note_of=Note("hello", AT),
    parent=None,
)


def back(value: object, annotation: Any) -> Any:
    """By way of JSON."""
    load = find_load(annotation)
    assert load is not None
    return load(json.loads(encode_json(value)))


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (ORDER, Order),
        ([ORDER, ORDER], list[Order]),
        (Item("x"), Item | None),
        (None, Item | None),
        ({"a": Item("x")}, dict[str, Item]),
        (Bill(sum=Decimal(1), at=AT), Bill),
        ([Bill(sum=Decimal(1), at=AT)], list[Bill]),
        (Note("t", AT), Note),
        ((Note("t"), Note("u")), tuple[Note, ...]),
        (Checked(3), Checked),
    ],
)
def test_what_comes_back_is_what_went(value: object, annotation: Any) -> None:
    assert back(value, annotation) == value


def test_an_order_holds_another() -> None:
    parent = Order(**{**vars(ORDER), "parent": ORDER})
    assert back(parent, Order) == parent


@given(
    st.builds(
        Item,
        name=st.text(st.characters(exclude_categories=["Cs"])),
        price=st.decimals(allow_nan=False, allow_infinity=False),
    )
)
def test_any_item_comes_back(item: Item) -> None:
    assert back(item, Item) == item


def test_models_are_encoded_wherever_they_are() -> None:
    assert json.loads(encode_json({"a": [Item("x"), Note("t")], "b": Bill(sum=Decimal("0.5"), at=AT)})) == {
        "a": [{"name": "x", "price": "1.50"}, {"text": "t", "at": None}],
        "b": {"sum": "0.5", "at": "2026-01-02T03:04:05.000006Z", "lines": []},
    }


@pytest.mark.parametrize("plain", [int, str, dict[str, int], list[Any], Any, datetime, Literal["a"], None])
def test_what_has_no_model_in_it_is_left_alone(plain: Any) -> None:
    assert find_load(plain) is None


GOOD: dict[str, Any] = json.loads(encode_json(ORDER))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "5"}, "user: an int is wanted, not str"),
        ({"user": True}, "user: an int is wanted, not bool"),
        ({"items": [{"name": 1}]}, "items.0.name: a str is wanted, not int"),
        ({"items": [{}]}, "items.0.name: it is missing"),
        ({"items": {}}, "items: a list is wanted, not dict"),
        ({"id": "secret"}, "id: it is no UUID"),
        ({"at": "secret"}, "at: it is no datetime"),
        ({"at": None}, "at: a str is wanted, not null"),
        ({"colour": "secret"}, "colour: it is no Colour"),
        ({"state": "secret"}, "state: one of 'new', 'paid' is wanted"),
        ({"share": "secret"}, "share: a float is wanted, not str"),
        ({"share": 10**400}, "share: the number is too large for a float"),
        ({"wait": 1e300}, "wait: the number of seconds is too large for a timedelta"),
        ({"note": 5}, "note: a str is wanted, not int, or null is wanted, not int"),
        ({"pair": [1]}, "pair: a list of 2 is wanted"),
        ({"tags": [[]]}, "tags.0: a str is wanted, not list"),
        ({"prices": {"secret": "x"}}, "prices.secret: it is no Decimal"),
        ({"bill": {"sum": "secret", "at": "2026-01-02T03:04:05Z"}}, "bill: sum: Input should be a valid decimal"),
        ({"note_of": {"text": 5}}, "note_of: Expected `str`, got `int` - at `$.text`"),
        ({"parent": {}}, "parent: "),
    ],
)
def test_what_does_not_fit_is_said_without_the_value(change: dict[str, Any], reason: str) -> None:
    load = find_load(Order)
    assert load is not None
    with pytest.raises(SkipRetry) as error:
        load_or_skip(load, GOOD | change, "the payload", Order)
    text = str(error.value)
    assert text.startswith("the payload does not fit Order: ")
    assert reason in text
    assert "secret" not in text.replace("prices.secret", "")


def test_an_unknown_enum_value_of_msgspec_is_not_quoted() -> None:
    class Painted(msgspec.Struct):
        colour: Paint

    with pytest.raises(SkipRetry, match=r"does not fit Painted: Invalid enum value - at `\$\.colour`$"):
        load_or_skip(_load(Painted), {"colour": "secret"}, "the payload", Painted)


def _load(annotation: Any) -> Any:
    return find_load(annotation)


def test_fields_of_a_newer_producer_are_passed_by() -> None:
    assert _load(Item)({"name": "x", "price": "2", "size": 5}) == Item("x", Decimal(2))


def test_a_dataclass_checks_itself() -> None:
    @dataclass
    class Even:
        n: int

        def __post_init__(self) -> None:
            if self.n % 2:
                raise ValueError("it is odd")

    with pytest.raises(SkipRetry, match="the payload does not fit Even: it is odd"):
        load_or_skip(_load(Even), {"n": 3}, "the payload", Even)


def test_what_json_has_nothing_for_is_refused_where_it_is_asked_for() -> None:
    @dataclass
    class Odd:
        data: memoryview

    with pytest.raises(SettingsError, match=r"field data of Odd: .*memoryview.* can't be made of what JSON holds"):
        find_load(Odd)

    @dataclass
    class Unknown:
        what: NotThere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(SettingsError, match="Unknown can't be made of what JSON holds: name 'NotThere' is not defined"):
        find_load(Unknown)

    class Mixed(msgspec.Struct):
        colour: Colour

    with pytest.raises(SettingsError, match="Mixed can't be made of what JSON holds: Enums must contain"):
        find_load(Mixed)
    with pytest.raises(SettingsError, match="can't be made of what JSON holds"):
        find_load(dict[Bill, memoryview])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Item(b"x"), r"payload\.name: bytes can't be encoded as JSON"),  # type: ignore[arg-type]
        ({"a": Item}, r"payload\.a: type can't be encoded as JSON"),
        (object(), "payload: object can't be encoded as JSON"),
        (Checked, "payload: type can't be encoded as JSON"),
        ({"at": AT}, r"payload\.at: datetime can't be encoded as JSON"),
    ],
)
def test_what_can_not_be_encoded(value: object, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        encode_json(value)


def test_a_number_that_json_has_not() -> None:
    @dataclass
    class Share:
        part: float

    with pytest.raises(PayloadError, match=r"payload\.part"):
        encode_json(Share(math.nan))


def test_a_model_that_holds_itself() -> None:
    item = Item("x")
    item.name = item  # type: ignore[assignment]
    with pytest.raises(PayloadError):
        encode_json(item)


def test_an_edit_takes_models() -> None:
    client = Client("host=nowhere connect_timeout=1")
    with pytest.raises(PayloadError, match="bytes can't be encoded"):
        client.edit_task(1, payload=Item(b"x"))  # type: ignore[arg-type]


def test_neither_library_is_needed_or_loaded() -> None:
    code = (
        "import sys, dataclasses, fastq, fastq._models as m; from fastq._engine import encode_json\n"
        "@dataclasses.dataclass\nclass A:\n    n: int\n"
        "assert encode_json(A(1)) == b'{\"n\":1}' and m.find_load(A)({'n': 1}) == A(1)\n"
        "assert not {'pydantic', 'msgspec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
