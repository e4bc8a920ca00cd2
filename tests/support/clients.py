"""Both kinds of client for tests that are written once."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

from fastq import AsyncClient, Client

Kind: TypeAlias = Literal["sync", "async"]
KINDS: tuple[Kind, ...] = ("sync", "async")


class Bridge:
    """An `AsyncClient` on a loop in a thread of its own, called as a `Client` is.

    What it does in transactions of its own. In those of others, on blocking connections, ``beside`` does it.
    """

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop, beside: Client) -> None:
        self._client = client
        self._on = loop
        self._beside = beside

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_tx"):
            return getattr(self._beside, name)
        found = getattr(self._client, name)
        if not inspect.iscoroutinefunction(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(found(*args, **kwargs), self._on).result(60)

        return call


@contextmanager
def open_client(kind: Kind, dsn: str, *, schema: str, **options: Any) -> Iterator[Client]:
    """A client of that kind, whose methods are called without await. At the end it is closed."""
    if kind == "sync":
        with Client(dsn, schema=schema, **options) as client:
            yield client
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    bridge = Bridge(AsyncClient(dsn, schema=schema, **options), loop, Client(dsn, schema=schema))
    try:
        yield cast("Client", bridge)
    finally:
        bridge.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
