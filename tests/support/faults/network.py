"""A TCP proxy in front of PostgreSQL that does what networks do: it holds, swallows, delays, cuts, resets, and loses one answer."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

Way = Literal["requests", "answers"]
#: With it, closing a socket sends RST, and drops what was not sent yet.
_RESET: Final = struct.pack("ii", 1, 0)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@dataclass(eq=False)
class _Link:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket | None
    """None: made while all was swallowed."""
    is_swallowed: bool = False
    """It lost a byte, so nothing that comes after it may arrive."""
    is_ending: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def source(self, way: Way) -> socket.socket:
        source = self.client if way == "requests" else self.server
        assert source is not None
        return source

    def sink(self, way: Way) -> socket.socket:
        return self.source("answers" if way == "requests" else "requests")

    def end(self, *, reset: bool = False) -> None:
        with self.lock:
            if self.is_ending:
                return
            self.is_ending = True
        both = [each for each in (self.client, self.server) if each is not None]
        for each in both:
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                # Wakes the thread that reads it: until then its file is in use, and closing it does nothing. No FIN before an RST.
                each.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        for each in both:
            each.close()


class Proxy:
    """Listens on loopback. `dsn` leads through it to the database of the DSN it was given; a server that is down refuses there, too.

    All that it does wrong holds for all of its connections. Any thread may call.
    """

    def __init__(self, dsn: str) -> None:
        given = conninfo_to_dict(dsn)
        host, port = str(given.get("host") or "127.0.0.1"), int(str(given.get("port") or 5432))
        self._target: str | tuple[str, int] = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=str(self._listener.getsockname()[1]))
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._flows: dict[Way, threading.Event] = {"requests": threading.Event(), "answers": threading.Event()}
        self._is_open = True
        self._is_swallowing = False
        self._delay = 0.0
        self._lose: tuple[bytes, bool, bool] | None = None
        self.connections = 0
        """How many were made."""
        self.lost = 0
        """Requests that `lose_request` or `lose_answer_to` stopped."""
        self.swallowed = 0
        """Bytes that `swallow` took."""
        self.flow()
        threading.Thread(target=self._accept, daemon=True).start()

    # --- what stays open, and is late --------------------------------------------------------------

    def hold_answers(self) -> None:
        """From now on the server's answers stay here, in order; requests go through."""
        self._flows["answers"].clear()

    def hold_requests(self) -> None:
        """From now on requests stay here, in order."""
        self._flows["requests"].clear()

    def hold(self) -> None:
        """From now on nothing flows, either way; what was held arrives after `flow`, as after a break that TCP survives."""
        self.hold_requests()
        self.hold_answers()

    def delay(self, ms: float) -> None:
        """From now on each piece arrives so many milliseconds late, each way. 0: at once again."""
        self._delay = ms / 1000

    def flow(self) -> None:
        """What was held goes on its way, and all that follows. Ends `hold` and `swallow`; what was swallowed is gone for good."""
        self._is_swallowing = False
        for flow in self._flows.values():
            flow.set()

    # --- what is silent for ever -------------------------------------------------------------------

    def swallow(self, seconds: float | None = None) -> None:
        """From now on each byte vanishes, and nobody is told: connections stay open, also those that are made meanwhile.

        A connection that lost a byte, or its end, is silent for ever on both sides, as behind a firewall that forgot it; after `flow`,
        or after so many seconds, new ones work, and those that had nothing to say.
        """
        self._is_swallowing = True
        if seconds is not None:
            timer = threading.Timer(seconds, self.flow)
            timer.daemon = True
            timer.start()

    # --- what ends ---------------------------------------------------------------------------------

    def cut(self) -> int:
        """Ends all connections and forgets what was held; new ones flow again. Gives how many it ended."""
        return self._end_all(reset=False)

    def reset(self) -> int:
        """As `cut`, by RST: both sides see "connection reset by peer", and what was on its way is dropped."""
        return self._end_all(reset=True)

    def half_close(self, way: Way = "answers") -> int:
        """Ends one direction of all connections: "answers": clients see the server's end of stream, and what they send still arrives.
        Gives how many it were."""
        with self._lock:
            links = list(self._links)
        count = 0
        for link in links:
            with contextlib.suppress(OSError, AssertionError):
                link.sink(way).shutdown(socket.SHUT_WR)
                count += 1
        return count

    def refuse(self) -> None:
        """Ends all connections, and every new one."""
        self._is_open = False
        self.cut()

    def accept(self) -> None:
        """Ends `refuse`."""
        self._is_open = True

    # --- what loses one statement ------------------------------------------------------------------

    def lose_request(self, marker: bytes) -> None:
        """The next request that holds `marker` never arrives: its connection ends instead."""
        self._lose = (marker, True, False)

    def lose_answer_to(self, marker: bytes, *, then_refuse: bool = False) -> None:
        """The next request that holds `marker` arrives and is served to its end, and its answer is lost with the connection."""
        self._lose = (marker, False, then_refuse)

    # --- inside ------------------------------------------------------------------------------------

    @property
    def open_connections(self) -> int:
        """How many there are now, silent ones too."""
        with self._lock:
            return len(self._links)

    def _end_all(self, *, reset: bool) -> int:
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            link.end(reset=reset)
        self.flow()
        return len(links)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            # A thread each: a connection that is being made must not keep the next one waiting.
            threading.Thread(target=self._begin, args=(client,), daemon=True).start()

    def _begin(self, client: socket.socket) -> None:
        if self._is_refusing():
            client.close()
            return
        server: socket.socket | None = None
        if not self._is_swallowing:
            try:
                if isinstance(self._target, str):
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(self._target)
                else:
                    server = socket.create_connection(self._target)
            except OSError:
                client.close()
                if server is not None:
                    server.close()
                return
        link = _Link(client, server, is_swallowed=server is None)
        with self._lock:
            self._links.add(link)
            self.connections += 1
        if self._is_refusing():
            # It came in while all others were being ended.
            self._forget(link)
            link.end()
        elif server is None:
            # Read, so that its sender is not held up.
            threading.Thread(target=self._sink_all, args=(link,), daemon=True).start()
        else:
            for way in self._flows:
                threading.Thread(target=self._pump, args=(link, way), daemon=True).start()

    def _is_refusing(self) -> bool:
        return not self._is_open

    def _pump(self, link: _Link, way: Way) -> None:
        """Passes on what comes one way; its end ends both."""
        source = link.source(way)
        waiting: deque[tuple[float, bytes]] = deque()
        poll = select.poll()
        has_ended = False
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed, so it has no number any more
            poll.register(source, select.POLLIN)
            while waiting or not has_ended:
                left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
                if has_ended:
                    time.sleep(left or 0)
                elif poll.poll(None if left is None else left * 1000 + 0.5):
                    data = source.recv(65536)
                    has_ended = not data
                    # Its end is as much a packet as its bytes are.
                    if not self._takes(link, data) and data:
                        waiting.append((time.monotonic() + self._delay, data))
                while waiting and waiting[0][0] <= time.monotonic():
                    if self._deliver(link, way, waiting.popleft()[1]):
                        # The other direction's thread ends both when the server is through.
                        return
        if not link.is_swallowed:
            self._forget(link)
            link.end()

    def _deliver(self, link: _Link, way: Way, data: bytes) -> bool:
        """Sends a piece on, once all flows. True: it is the last one, and is served in secret."""
        self._flows[way].wait()
        if self._takes(link, data):
            return False
        if way == "requests" and self._lose is not None and self._lose[0] in data:
            if self._lose_one(link, data):
                return True
            raise ConnectionResetError("a request was to be lost")
        with self._lock:
            is_alive = link in self._links
        if is_alive:
            link.sink(way).sendall(data)
        return False

    def _takes(self, link: _Link, data: bytes) -> bool:
        """Whether these bytes, or this end of stream, vanish."""
        if self._is_swallowing:
            link.is_swallowed = True
        if not link.is_swallowed:
            return False
        self.swallowed += len(data)
        if not data:
            # Nobody is told. Only the proxy's own end, or `cut`, frees what is left.
            raise OSError("the end of a silent connection")
        return True

    def _sink_all(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.client.recv(65536):
                self.swallowed += len(data)

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _lose_one(self, link: _Link, request: bytes) -> bool:
        """Loses the request, or the answer to it; True: it is served."""
        assert self._lose is not None
        _, is_request_lost, then_refuse = self._lose
        self._lose = None
        self._forget(link)
        self.lost += 1
        if then_refuse:
            self._is_open = False
        if is_request_lost:
            return False
        assert link.server is not None
        link.server.sendall(request)
        # The server serves what it has, then sees that nothing more will come, and ends.
        link.server.shutdown(socket.SHUT_WR)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()
        self.refuse()
