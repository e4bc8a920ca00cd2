"""What lives as long as a worker: hooks at its start and stop, and the resources that functions get as arguments."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Final, TypeAlias, TypeVar

from fastq.errors import ConsumerError, SettingsError

Hook: TypeAlias = Callable[[], object]
"""A function without arguments, sync or async; what it returns is dropped."""
Manager: TypeAlias = Callable[[], Any]
"""A generator function without arguments that yields once, sync or async, or any function that gives a context manager."""

H = TypeVar("H", bound=Callable[[], Any])

_log = logging.getLogger("fastq.consumer")

_NOT_OPEN: Final = "a resource is there only while a worker runs"


class Dependency:
    """Stands for a parameter's argument until a worker has it. Made by `Depends`."""

    __slots__ = ("factory",)

    def __init__(self, factory: Callable[[], object]) -> None:
        self.factory = factory

    def __repr__(self) -> str:
        return f"Depends({getattr(self.factory, '__name__', self.factory)})"


def Depends(factory: Callable[[], object]) -> Any:  # noqa: N802 - as it is known elsewhere
    """A default for a parameter of an `App.task` function: in a worker it gets what ``factory`` gave when the worker started.

    Once for each worker (a started `Consumer` of an `App`) and factory, shared by all of its handlers, which run in several threads. The
    parameter is no part of the payload: whoever enqueues can't pass it. Whoever calls the function itself passes it.

    Args:
        factory: a function without arguments. ``async def`` is awaited; a generator function, sync or async, yields once, and goes on
            when the worker stops.

    Raises:
        SettingsError: it can't be called.
    """
    check_callable("factory", factory)
    return Dependency(factory)


def check_callable(what: str, given: object) -> None:
    """That it is a function. Raises SettingsError."""
    if not callable(given):
        raise SettingsError(f"{what} is {given!r}, but must be a function without arguments")


class Lifespan:
    """A worker's surroundings: opened before its first task, closed after its last handler has ended.

    Args:
        starts: startup hooks and context managers, opened in this order; (True, …) is a context manager.
        shutdowns: hooks that run at the close, the last one first, before anything else is closed.
        factories: of resources, opened after all of ``starts``, each once.
    """

    def __init__(
        self, starts: Iterable[tuple[bool, Hook]], shutdowns: Iterable[Hook], factories: Iterable[Callable[[], object]]
    ) -> None:
        self._starts = list(starts)
        self._shutdowns = list(shutdowns)
        self._factories = list(dict.fromkeys(factories))
        self._values: dict[Callable[[], object], object] = {}
        self._stack: AsyncExitStack | None = None

    @property
    def needs_loop(self) -> bool:
        """Whether something of it is async."""
        every = [*(hook for _, hook in self._starts), *self._shutdowns, *self._factories]
        return any(_is_async(each) for each in every)

    def get(self, factory: Callable[[], object]) -> object:
        """The resource. Raises ConsumerError: it is not open."""
        try:
            return self._values[factory]
        except KeyError:
            raise ConsumerError(_NOT_OPEN) from None

    async def open(self) -> None:
        """Open all of it; what was opened is closed again if something fails.

        Raises:
            ConsumerError: a hook or factory failed, which is its cause.
        """
        async with AsyncExitStack() as stack:
            for is_manager, hook in self._starts:
                what = "lifespan" if is_manager else "startup hook"
                with _failing(what, hook):
                    await (_enter(stack, hook) if is_manager else _result(hook))
            for factory in self._factories:
                with _failing("the factory", factory):
                    is_manager = inspect.isgeneratorfunction(factory) or inspect.isasyncgenfunction(factory)
                    self._values[factory] = await (_enter(stack, factory) if is_manager else _result(factory))
            for hook in self._shutdowns:
                stack.push_async_callback(_result, hook)
            self._stack = stack.pop_all()

    async def close(self) -> None:
        """Close what is open, all of it, whatever of it fails. Idempotent.

        Raises:
            ConsumerError: something failed: the last error is its cause, with the others as its context.
        """
        stack, self._stack = self._stack, None
        if stack is None:
            return
        try:
            await stack.aclose()
        except Exception as error:
            _log.exception("a shutdown hook failed")
            raise ConsumerError(f"a shutdown hook failed: {type(error).__name__}: {error}") from error
        finally:
            self._values.clear()


@contextlib.contextmanager
def _failing(what: str, hook: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.exception("%s failed", what)
        name = getattr(hook, "__qualname__", repr(hook))
        raise ConsumerError(
            f"{what} {name} failed, so the worker did not start: {type(error).__name__}: {error}"
        ) from error


async def _result(hook: Callable[[], Any]) -> Any:
    found = hook()
    return await found if inspect.isawaitable(found) else found


async def _enter(stack: AsyncExitStack, manager: Callable[[], Any]) -> Any:
    if inspect.isasyncgenfunction(manager):
        return await stack.enter_async_context(contextlib.asynccontextmanager(manager)())
    if inspect.isgeneratorfunction(manager):
        return stack.enter_context(contextlib.contextmanager(manager)())
    found = manager()
    if hasattr(found, "__aenter__"):
        return await stack.enter_async_context(found)
    return stack.enter_context(found)


def _is_async(hook: Callable[[], object]) -> bool:
    # A function that gives a context manager is asked for it where a loop is: it may be an async one.
    plain = inspect.unwrap(hook)
    return any(
        check(each) for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction) for each in (hook, plain)
    )


def run_without_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run what awaits nothing."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise ConsumerError("a hook that is no coroutine function gave something to await: make it `async def`")


def dependencies_of(function: Callable[..., object]) -> dict[str, Callable[[], object]]:
    """Factories by parameter."""
    return {
        name: parameter.default.factory
        for name, parameter in inspect.signature(function).parameters.items()
        if isinstance(parameter.default, Dependency)
    }


def signature_of(function: Callable[..., object]) -> inspect.Signature:
    """The function's signature without the parameters that are no part of the payload."""
    signature = inspect.signature(function)
    kept = [each for each in signature.parameters.values() if not isinstance(each.default, Dependency)]
    return signature.replace(parameters=kept)


__all__ = [
    "Dependency",
    "Depends",
    "Hook",
    "Lifespan",
    "Manager",
    "check_callable",
    "dependencies_of",
    "run_without_loop",
    "signature_of",
]
