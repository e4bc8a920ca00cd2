"""Payloads as instances of classes: dataclasses, pydantic and msgspec models, from and to what JSON can hold.

Neither pydantic nor msgspec is imported before a class of theirs is seen. A dataclass is read by its fields' annotations here, whatever
else is installed: what it takes must not depend on that.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fastq import _engine
from fastq._dataclasses import Mismatch, dump, read_type
from fastq.control import SkipRetry
from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

Load: TypeAlias = Callable[[Any], Any]
"""Makes an instance of what JSON holds. Raises `Mismatch`."""

# What they quote of the value: it may be what no log should hold.
_QUOTED: Final = re.compile(r"^(Invalid(?: enum)? value) .*?(?= - at `|$)", re.DOTALL)


def to_plain(value: object) -> object:
    """What a model consists of, for the engine, which writes it as JSON.

    Raises:
        TypeError: it is no instance of a model, or of one that can't be encoded.
    """
    kind: Any = type(value)
    try:
        if _is_pydantic(kind):
            return _adapter(kind).dump_python(value, mode="json", by_alias=True)
        if _is_msgspec(kind):
            return sys.modules["msgspec"].to_builtins(value, str_keys=True)
        if dataclasses.is_dataclass(kind):
            return dump(value)
    except Exception as error:
        # The model's own code takes part in it.
        raise TypeError(f"{kind.__name__} can't be encoded as JSON: {error}") from error
    raise TypeError(f"{kind.__name__} can't be encoded as JSON")


def payload_as(task: TaskInfo, model: Any) -> Any:
    """The payload as an instance of ``model``.

    Raises:
        SkipRetry: it does not fit: no attempt would be better.
        SettingsError: ``model`` is no model.
    """
    load = find_load(model)
    if load is None:
        raise SettingsError(f"{model!r} is no model: a dataclass, or a class of pydantic or msgspec")
    return load_or_skip(load, task.payload, "the payload", model)


def load_or_skip(load: Load, value: object, what: str, model: Any) -> Any:
    """What ``load`` makes of a value. Raises SkipRetry: it does not fit."""
    try:
        return load(value)
    except Mismatch as error:
        # Not from the original, which may quote the payload.
        raise SkipRetry(f"{what} does not fit {_name(model)}: {error}") from None


@cache
def find_load(annotation: Any) -> Load | None:
    """How to make what an annotation says; None: there is no model in it, and the value stays as it is.

    Raises:
        SettingsError: there is something in it that JSON has nothing for.
    """
    kinds = list(_classes_in(annotation))
    try:
        if any(_is_pydantic(kind) for kind in kinds):
            return _by_pydantic(annotation)
        if any(_is_msgspec(kind) for kind in kinds):
            return _by_msgspec(annotation)
        if any(dataclasses.is_dataclass(kind) for kind in kinds):
            return read_type(annotation, _find_foreign)
    except SettingsError:
        raise
    except Exception as error:
        # Each has an error of its own for what it does not know.
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"{_name(annotation)} can't be made of what JSON holds: {reason}") from error
    return None


def _find_foreign(annotation: Any) -> Load | None:
    """Within a dataclass: how the others' models are made."""
    if _is_pydantic(annotation):
        return _by_pydantic(annotation)
    return _by_msgspec(annotation) if _is_msgspec(annotation) else None


def _classes_in(annotation: Any) -> typing.Iterator[type]:
    # (A parametrized list is an instance of `type`, too.)
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        yield annotation
    elif sys.version_info >= (3, 12) and isinstance(annotation, typing.TypeAliasType):
        yield from _classes_in(annotation.__value__)
    else:
        origin = typing.get_origin(annotation)
        if isinstance(origin, type):
            yield origin
        if origin is not typing.Literal:
            for part in typing.get_args(annotation):
                yield from _classes_in(part)


def _is_pydantic(kind: object) -> bool:
    # Its models and its dataclasses.
    return isinstance(kind, type) and "__pydantic_validator__" in dir(kind) and "pydantic" in sys.modules


def _is_msgspec(kind: object) -> bool:
    msgspec = sys.modules.get("msgspec")
    return msgspec is not None and isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@cache
def _adapter(annotation: Any) -> Any:
    return sys.modules["pydantic"].TypeAdapter(annotation)


def _by_pydantic(annotation: Any) -> Load:
    adapter = _adapter(annotation)

    def load(value: object) -> Any:
        try:
            # By way of JSON, in which strict models take texts for times and lists for tuples.
            return adapter.validate_json(_to_json(value))
        except ValueError as error:
            raise Mismatch(_reason(error)) from None

    return load


def _to_json(value: object) -> bytes:
    if isinstance(value, bytes):
        raise Mismatch("it is raw bytes")
    return _engine.encode_json(value)


def _reason(error: ValueError) -> str:
    """Why a value does not fit, without the value."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    reasons = errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in reasons)


def _by_msgspec(annotation: Any) -> Load:
    msgspec = sys.modules["msgspec"]
    decoder = msgspec.json.Decoder(annotation)

    def load(value: object) -> Any:
        try:
            return decoder.decode(_to_json(value))
        except msgspec.ValidationError as error:
            raise Mismatch(_QUOTED.sub(r"\1", str(error))) from None

    return load


def read_hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """A function's annotations by parameter, without those that can't be found at run time (imported for a type checker only)."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # noqa: BLE001 - an annotation may be any expression
        found: dict[str, Any] = {}
        names = getattr(function, "__globals__", {})
        for name, hint in getattr(function, "__annotations__", {}).items():
            holder = type("_Holder", (), {"__annotations__": {name: hint}})
            try:
                found.update(typing.get_type_hints(holder, globalns=names))
            except Exception:  # noqa: BLE001, S112 - as above
                continue
        return found


def _name(model: Any) -> str:
    return model.__name__ if isinstance(model, type) else str(model)


__all__ = ["Load", "find_load", "load_or_skip", "payload_as", "read_hints", "to_plain"]
