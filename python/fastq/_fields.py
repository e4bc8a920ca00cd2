"""Calls a function with a payload's fields, those that its annotations say are models as their instances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from fastq._models import Load, find_load, load_or_skip, read_hints
from fastq.control import SkipRetry
from fastq.errors import SettingsError
from fastq.lifespan import Lifespan, dependencies_of, signature_of

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

Handler = Callable[["TaskInfo"], Any]

_REST: Final = inspect.Parameter.VAR_KEYWORD


def call_with_fields(
    function: Callable[..., Any],
    type: str,  # noqa: A002 - the word that tasks use
    lifespan: Lifespan,
) -> Handler:
    """A handler that calls ``function`` with the payload's fields, and the resources that it depends on, which ``lifespan`` has.

    A payload that does not fit fails its task at once.

    Raises:
        SettingsError: a parameter is annotated with a dataclass that JSON has nothing for.
    """
    signature = signature_of(function)
    loads, rest = _find_loads(function, signature, type)
    wanted = dependencies_of(function)
    if not loads and rest is None and not wanted:
        return _call_plainly(function, signature)

    def handler(task: TaskInfo) -> Any:
        fields = task.payload
        if not isinstance(fields, dict):
            raise _misfit(signature, fields)
        made = dict(fields)
        for name, value in fields.items():
            found = loads.get(name, rest if name not in signature.parameters else None)
            if found is not None:
                load, hint = found
                made[name] = load_or_skip(load, value, f"the payload's {name}", hint)
        resources = {name: lifespan.get(factory) for name, factory in wanted.items()}
        try:
            return function(**made, **resources)
        except TypeError:
            _check_fit(signature, fields)
            raise

    return handler


def _call_plainly(function: Callable[..., Any], signature: inspect.Signature) -> Handler:
    def handler(task: TaskInfo) -> Any:
        try:
            return function(**task.payload)
        except TypeError:
            # The function's own, or its call's.
            _check_fit(signature, task.payload)
            raise

    return handler


def _find_loads(
    function: Callable[..., Any], signature: inspect.Signature, task_type: str
) -> tuple[Mapping[str, tuple[Load, Any]], tuple[Load, Any] | None]:
    """How parameters with models in their annotations are made, and those that have no parameter of their own."""
    hints = read_hints(function)
    loads: dict[str, tuple[Load, Any]] = {}
    rest = None
    for name, parameter in signature.parameters.items():
        if name not in hints:
            continue
        try:
            load = find_load(hints[name])
        except SettingsError as error:
            raise SettingsError(f"parameter {name} of the function for {task_type!r}: {error}") from None
        if load is None:
            continue
        if parameter.kind is _REST:
            rest = (load, hints[name])
        else:
            loads[name] = (load, hints[name])
    return loads, rest


def _check_fit(signature: inspect.Signature, fields: object) -> None:
    """That the function takes such a payload. Raises SkipRetry: it never will."""
    if not isinstance(fields, dict):
        raise _misfit(signature, fields)
    try:
        signature.bind(**fields)
    except TypeError as error:
        raise SkipRetry(f"the payload does not fit the function's parameters: {error}") from None


def _misfit(signature: inspect.Signature, payload: object) -> SkipRetry:
    return SkipRetry(f"the payload is {type(payload).__name__}, but the function takes fields: {signature}")


__all__ = ["call_with_fields"]
