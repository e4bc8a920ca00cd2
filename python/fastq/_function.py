"""A function that is a task: its arguments become a payload, and a payload its arguments."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, Unpack

from fastq._options import read_name
from fastq.errors import SettingsError
from fastq.lifespan import signature_of
from fastq.task import Enqueued, Task, TaskKeywords

if TYPE_CHECKING:
    from fastq.producer import Producer

P = ParamSpec("P")
R = TypeVar("R")


class HasProducer(Protocol):
    """An app, as its functions need it."""

    @property
    def producer(self) -> Producer: ...
    @property
    def has_producer(self) -> bool: ...


class TaskOptions(TaskKeywords, total=False):
    """What `TaskFunction.with_options` takes, each as `Task` does."""

    queue: str
    max_attempts: int
    idempotency_token: str | None


@dataclass(frozen=True, slots=True)
class Options:
    """What a task gets beside its type and payload."""

    queue: str
    max_attempts: int
    idempotency_token: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Of `TaskKeywords` what was given."""


class TaskFunction(Generic[P, R]):
    """A function that is a task's handler, made by `App.task`. Called, it is just called; ``enqueue`` makes it a task.

    Attributes:
        type: ties its tasks to it.
    """

    def __init__(
        self,
        app: HasProducer,
        function: Callable[P, R],
        type: str,  # noqa: A002 - the word that tasks use
        options: Options,
    ) -> None:
        update_wrapper(self, function)
        self.type = type
        self._app = app
        self._function = function
        self._options = options
        self._signature, self._names, self._required = _read_signature(function, type)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.type!r}: {self._function!r}>"

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Enqueued:
        """Enqueue a task that will call the function with these arguments.

        Raises:
            TypeError: the function does not take these arguments.
            FastqError: as `Producer.enqueue`.
        """
        # The task first: wrong arguments need no database to be refused.
        task = self.task(*args, **kwargs)
        return self._app.producer.enqueue(task)

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> Enqueued:
        """As ``enqueue``, without making the event loop wait.

        Raises:
            TypeError, FastqError: as ``enqueue``.
        """
        task = self.task(*args, **kwargs)
        app = self._app
        # Made off the loop: a private PostgreSQL may have to start.
        producer = app.producer if app.has_producer else await asyncio.to_thread(lambda: app.producer)
        return await producer.aenqueue(task)

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """The task that ``enqueue`` would enqueue, for ``enqueue_many``.

        Raises:
            TypeError: the function does not take these arguments.
        """
        return self._make(self._payload(args, kwargs), self._options)

    def _make(self, payload: dict[str, Any], options: Options) -> Task:
        return Task(
            self.type,
            payload,
            queue=options.queue,
            max_attempts=options.max_attempts,
            idempotency_token=options.idempotency_token,
            **options.more,
        )

    def with_options(self, **options: Unpack[TaskOptions]) -> TaskFunction[P, R]:
        """The same with other options for its tasks; this one stays as it is.

        Args:
            **options: ``delay``, ``run_at``, ``queue``, ``priority``, ``max_attempts``, ``timeout``, ``retry``, ``expires_at``,
                ``idempotency_token`` and the token's options, each as `Task` takes it.

        Raises:
            SettingsError: a value out of range.
        """
        if unknown := options.keys() - TaskOptions.__annotations__.keys():
            raise SettingsError(
                f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TaskOptions.__annotations__)}"
            )
        given: dict[str, Any] = dict(options)
        more = {name: given.pop(name) for name in TaskKeywords.__annotations__ if name in given}
        changed = replace(self._options, more={**self._options.more, **more}, **given)
        # Checked here, where the values are given.
        read_name("queue", changed.queue)
        self._make({}, changed)
        made = copy.copy(self)
        vars(made)["_options"] = changed
        return made

    def _payload(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args and self._required <= kwargs.keys() and (self._names is None or kwargs.keys() <= self._names):
            return kwargs
        # Slower, and right about all else: positions become names, and what is wrong is a TypeError.
        bound = self._signature.bind(*args, **kwargs)
        payload = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                payload.update(payload.pop(name, {}))
        return payload


def _read_signature(
    function: Callable[..., object],
    type: str,  # noqa: A002
) -> tuple[inspect.Signature, frozenset[str] | None, frozenset[str]]:
    """The signature, the names it takes (None: any), and those it needs."""
    signature = signature_of(function)
    names, required, takes_any = set(), set(), False
    for name, parameter in signature.parameters.items():
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL}:
            raise SettingsError(
                f"parameter {parameter} of the function for {type!r} has no name to pass it by: "
                "a payload's fields are passed by name"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
            continue
        names.add(name)
        if parameter.default is parameter.empty:
            required.add(name)
    return signature, None if takes_any else frozenset(names), frozenset(required)


__all__ = ["HasProducer", "Options", "TaskFunction", "TaskOptions"]
