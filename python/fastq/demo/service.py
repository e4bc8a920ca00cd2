"""A service on loopback for handlers to talk to: one line in, one line out.

``echo TEXT`` answers TEXT after a pause. ``deliver LINE FAILURES`` answers ``ok``, but ``busy`` to the first FAILURES requests
for that line: it counts them itself, so that what a task meets does not depend on what fastq knows about its attempts.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Self

#: What the service answers where it can't serve now.
BUSY = b"busy"


class Service:
    """The service, on an event loop in a thread of its own. Usable as a context manager.

    Args:
        wait: seconds until an echo is answered.

    Attributes:
        host: where it listens.
        port: the port there.
    """

    def __init__(self, wait: float) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self._wait = wait
        self._requests: Counter[bytes] = Counter()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fastq-demo-service", daemon=True)
        self._ready: Future[int] = Future()

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = self._ready.result()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def answer(self, request: bytes) -> tuple[float, bytes]:
        """The answer to ``request``, and the seconds to wait before it is sent."""
        word, _, rest = request.partition(b" ")
        if word == b"echo":
            return self._wait, rest
        if word == b"deliver":
            line, _, failures = rest.partition(b" ")
            self._requests[line] += 1
            return 0, BUSY if self._requests[line] <= int(failures) else b"ok"
        return 0, b"unknown"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        try:
            server = await self._loop.create_server(lambda: _Connection(self), self.host, 0)
        except OSError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()


class _Connection(asyncio.Protocol):
    def __init__(self, service: Service) -> None:
        self._service = service
        self._transport: asyncio.WriteTransport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101 - a server's transports are
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\n")
        for request in requests:
            wait, answer = self._service.answer(request)
            if wait:
                asyncio.get_running_loop().call_later(wait, self._send, answer)
            else:
                self._send(answer)

    def _send(self, answer: bytes) -> None:
        # A worker that was killed does not hear it.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(answer + b"\n")


__all__ = ["BUSY", "Service"]
