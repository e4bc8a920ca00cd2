"""Dataclasses from and to what JSON can hold, by their fields' annotations."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import types
import typing
import uuid
from collections import abc
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final, TypeAlias

from fastq.errors import SettingsError

Load: TypeAlias = Callable[[Any], Any]
Foreign: TypeAlias = Callable[[Any], Load | None]


class Mismatch(Exception):  # noqa: N818 - it says what is the case
    """A value is not what an annotation says; why, without the value."""

    def __init__(self, reason: str, *path: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path

    def inside(self, step: object) -> Mismatch:
        """The same, seen from the container."""
        return Mismatch(self.reason, str(step), *self.path)

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.reason}" if self.path else self.reason


# What is a text in JSON: how it is read, and written.
_TEXTS: Final[Mapping[type, Load]] = {
    dt.datetime: dt.datetime.fromisoformat,
    dt.date: dt.date.fromisoformat,
    dt.time: dt.time.fromisoformat,
    uuid.UUID: uuid.UUID,
    Decimal: Decimal,
}
_LISTS: Final[Mapping[Any, Callable[[list[Any]], Any]]] = {
    list: list,
    set: set,
    frozenset: frozenset,
    abc.Sequence: list,
    abc.Iterable: list,
    abc.Collection: list,
    abc.Set: set,
}
_DICTS: Final = (dict, abc.Mapping, abc.MutableMapping)


def dump(value: Any) -> Any:
    """What an instance consists of. Other models in it are left to whoever writes it."""
    for kinds, write in _WRITES:
        if isinstance(value, kinds):
            return write(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "__pydantic_validator__"):
        return {field.name: dump(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    return value


_WRITES: Final[tuple[tuple[Any, Load], ...]] = (
    (enum.Enum, lambda value: dump(value.value)),
    (dt.datetime | dt.date | dt.time, lambda value: value.isoformat()),
    (dt.timedelta, lambda value: value.total_seconds()),
    (uuid.UUID | Decimal, str),
    (Mapping, lambda value: {dump(key): dump(each) for key, each in value.items()}),
    (list | tuple | set | frozenset, lambda value: [dump(each) for each in value]),
)


def read_type(annotation: Any, foreign: Foreign) -> Load:
    """How to make what an annotation says.

    Args:
        annotation: a dataclass, or a type made of dataclasses.
        foreign: gives it for classes of other kinds; None: it knows none.

    Raises:
        SettingsError: JSON has nothing for it.
    """
    return _Reader(foreign).read(annotation)


class _Reader:
    def __init__(self, foreign: Foreign) -> None:
        self._foreign = foreign
        # A dataclass may have itself inside.
        self._known: dict[type, Load] = {}

    def read(self, annotation: Any) -> Load:
        load = self._foreign(annotation)
        if load is None and annotation in _SIMPLE:
            load = _SIMPLE[annotation]
        if load is None:
            # (A parametrized list is an instance of `type`, too.)
            is_class = isinstance(annotation, type) and typing.get_origin(annotation) is None
            load = self._read_class(annotation) if is_class else self._read_form(annotation)
        if load is None:
            raise SettingsError(
                f"{annotation!r} can't be made of what JSON holds here; a pydantic or msgspec model may know how to"
            )
        return load

    def _read_class(self, kind: type) -> Load | None:
        if dataclasses.is_dataclass(kind):
            if kind not in self._known:
                # Looked up when it is called: by then it is the one below.
                self._known[kind] = lambda value: self._known[kind](value)  # noqa: PLW0108
                self._known[kind] = self._read_dataclass(kind)
            return self._known[kind]
        if issubclass(kind, enum.Enum):
            return _by_text(kind)
        return _by_text(_TEXTS[kind], kind.__name__) if kind in _TEXTS else None

    def _read_form(self, annotation: Any) -> Load | None:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        load: Load | None = None
        if isinstance(annotation, typing.NewType):
            load = self.read(annotation.__supertype__)
        elif origin is typing.Annotated:
            load = self.read(args[0])
        elif origin is typing.Literal:
            load = _one_of(args)
        elif origin in (typing.Union, types.UnionType):
            load = _first_of([self.read(arg) for arg in args])
        elif origin is tuple:
            load = self._read_tuple(args)
        elif origin in _LISTS:
            load = _list_of(_LISTS[origin], self.read(args[0]))
        elif origin in _DICTS:
            load = _dict_of(self.read(args[0]), self.read(args[1]))
        return load

    def _read_dataclass(self, kind: type) -> Load:
        hints = typing.get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        missing = dataclasses.MISSING
        needed = [field.name for field in fields if field.default is missing and field.default_factory is missing]
        reads: dict[str, Load] = {}
        for field in fields:
            try:
                reads[field.name] = self.read(hints[field.name])
            except SettingsError as error:
                raise SettingsError(f"field {field.name} of {kind.__name__}: {error}") from None

        def load(value: Any) -> Any:
            if not isinstance(value, dict):
                raise _wanted("an object", value)
            # What is there beyond its fields is passed by: a newer producer may know more of them.
            names = [name for name in reads if name in value]
            found = dict(zip(names, _each(((name, value[name]) for name in names), reads.__getitem__), strict=True))
            for name in needed:
                if name not in found:
                    raise Mismatch("it is missing", name)
            try:
                return kind(**found)
            except (TypeError, ValueError) as error:
                # What its own check said.
                raise Mismatch(str(error)) from None

        return load

    def _read_tuple(self, args: tuple[Any, ...]) -> Load:
        if len(args) == 2 and args[1] is ...:
            return _list_of(tuple, self.read(args[0]))
        reads = [self.read(arg) for arg in args]

        def load(value: Any) -> Any:
            if not isinstance(value, list) or len(value) != len(reads):
                raise Mismatch(f"a list of {len(reads)} is wanted")
            return tuple(_each(enumerate(value), lambda at: reads[at]))

        return load


def _as_it_is(value: Any) -> Any:
    return value


def _exactly(what: str, kind: type) -> Load:
    def load(value: Any) -> Any:
        if value.__class__ is not kind:
            raise _wanted(what, value)
        return value

    return load


def _number(value: Any) -> float:
    if value.__class__ is not float and value.__class__ is not int:
        raise _wanted("a float", value)
    try:
        return float(value)
    except OverflowError:
        raise Mismatch("the number is too large for a float") from None


def _timedelta(value: Any) -> dt.timedelta:
    seconds = _number(value)
    try:
        return dt.timedelta(seconds=seconds if math.isfinite(seconds) else math.inf)
    except OverflowError:
        raise Mismatch("the number of seconds is too large for a timedelta") from None


def _by_text(read: Load, name: str = "") -> Load:
    def load(value: Any) -> Any:
        try:
            if name and not isinstance(value, str):
                raise _wanted("a str", value)
            return read(value)
        except (ValueError, InvalidOperation):
            what = name or getattr(read, "__name__", "")
            raise Mismatch(f"it is no {what}") from None

    return load


def _one_of(choices: tuple[Any, ...]) -> Load:
    def load(value: Any) -> Any:
        for choice in choices:
            plain = choice.value if isinstance(choice, enum.Enum) else choice
            if value.__class__ is plain.__class__ and value == plain:
                return choice
        raise Mismatch(f"one of {', '.join(map(repr, choices))} is wanted")

    return load


def _first_of(loads: list[Load]) -> Load:
    def load(value: Any) -> Any:
        reasons = []
        for each in loads:
            try:
                return each(value)
            except Mismatch as error:
                reasons.append(str(error))
        raise Mismatch(", or ".join(reasons))

    return load


def _list_of(make: Callable[[list[Any]], Any], read: Load) -> Load:
    def load(value: Any) -> Any:
        if not isinstance(value, list):
            raise _wanted("a list", value)
        try:
            return make(_each(enumerate(value), lambda _: read))
        except TypeError as error:  # into a set, what can't be hashed
            raise Mismatch(str(error)) from None

    return load


def _dict_of(read_key: Load, read: Load) -> Load:
    def load(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _wanted("an object", value)
        values = _each(value.items(), lambda _: read)
        return dict(zip(_each(((key, key) for key in value), lambda _: read_key), values, strict=True))

    return load


def _each(items: abc.Iterable[tuple[Any, Any]], read_at: Callable[[Any], Load]) -> list[Any]:
    found = []
    for at, value in items:
        try:
            found.append(read_at(at)(value))
        except Mismatch as error:
            raise error.inside(at) from None
    return found


def _wanted(what: str, value: object) -> Mismatch:
    return Mismatch(f"{what} is wanted, not {'null' if value is None else type(value).__name__}")


_SIMPLE: Final[Mapping[Any, Load]] = {
    Any: _as_it_is,
    object: _as_it_is,
    None: _exactly("null", types.NoneType),
    types.NoneType: _exactly("null", types.NoneType),
    bool: _exactly("a bool", bool),
    int: _exactly("an int", int),
    str: _exactly("a str", str),
    float: _number,
    dt.timedelta: _timedelta,
    list: _exactly("a list", list),
    dict: _exactly("an object", dict),
    tuple: _list_of(tuple, _as_it_is),
    set: _list_of(set, _as_it_is),
    frozenset: _list_of(frozenset, _as_it_is),
}

__all__ = ["Mismatch", "dump", "read_type"]
