"""A TCP proxy that knows a worker's connections apart: those that claim, complete and control fail one by one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.waiting import wait_until

#: What a worker's three connections call themselves.
PARTS: Final = ("claim", "complete", "control")
_NAME: Final = b"application_name\0fastq "
# Codes in place of a protocol version: a wish for TLS or GSSAPI, which is turned down.
_WISHES: Final = (80877103, 80877104)


@dataclass(eq=False)
class _Link:
    """One connection, both ways."""

    part: str
    client: socket.socket
    server: socket.socket

    def end(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@dataclass
class _Part:
    """What holds for all connections of one name."""

    requests_flow: threading.Event = field(default_factory=threading.Event)
    answers_flow: threading.Event = field(default_factory=threading.Event)

    def flow(self) -> None:
        self.requests_flow.set()
        self.answers_flow.set()


class Links:
    """Listens on loopback. `dsn` leads through it to the database of the DSN it was given.

    Its methods take the names of parts (`PARTS`), and mean all of them where none is given.
    """

    def __init__(self, dsn: str) -> None:
        given = conninfo_to_dict(dsn)
        host, port = str(given.get("host") or "127.0.0.1"), int(str(given.get("port") or 5432))
        self._target: str | tuple[str, int] = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=str(self._listener.getsockname()[1]))
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._parts = {part: _Part() for part in PARTS}
        self._is_open = True
        self._held: Counter[tuple[str, str]] = Counter()
        self._fatal: dict[str, bytes] = {}
        self.requests: dict[str, bytes] = dict.fromkeys(PARTS, b"")
        """All that was sent through the connections of a part."""
        for part in self._parts.values():
            part.flow()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_requests(self, *parts: str) -> None:
        """From now on what the worker sends stays here."""
        for part in parts or PARTS:
            self._parts[part].requests_flow.clear()

    def hold_answers(self, *parts: str) -> None:
        """From now on what the server answers stays here; requests go through."""
        for part in parts or PARTS:
            self._parts[part].answers_flow.clear()

    def held(self, part: str, way: str = "requests") -> int:
        """How many connections of a part have something held here, ``"requests"`` or ``"answers"``."""
        return self._held[part, way]

    def wait_for_request(self, part: str) -> None:
        """Waits until a request of this part is held."""
        wait_until(lambda: self.held(part), message=f"a request to {part}")

    def wait_for_answer(self, part: str) -> None:
        """Waits until an answer to this part is held."""
        wait_until(lambda: self.held(part, "answers"), message=f"an answer to {part}")

    def flow(self, *parts: str) -> None:
        """What was held goes on its way, and all that follows."""
        for part in parts or PARTS:
            self._parts[part].flow()

    def cut(self, *parts: str) -> int:
        """Ends connections; what was held of them is lost, what new ones send flows. Gives how many it ended."""
        chosen = parts or PARTS
        with self._lock:
            ended = {link for link in self._links if link.part in chosen}
            self._links -= ended
        for link in ended:
            link.end()
        self.flow(*chosen)
        return len(ended)

    def cut_at(self, part: str, text: bytes) -> None:
        """The next request of this part that holds ``text`` never arrives: its connection ends instead."""
        self._fatal[part] = text

    def refuse(self) -> None:
        """Ends all connections, and every new one at once: the server is gone."""
        self._is_open = False
        self.cut()

    def accept(self) -> None:
        """The server is back."""
        self._is_open = True

    def _is_refusing(self) -> bool:
        return not self._is_open

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._begin, args=(client,), daemon=True).start()

    def _begin(self, client: socket.socket) -> None:
        if self._is_refusing():
            client.close()
            return
        try:
            start = _read_start(client)
            if isinstance(self._target, str):
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
            else:
                server = socket.create_connection(self._target)
            server.sendall(start)
        except OSError:
            client.close()
            return
        link = _Link(start.partition(_NAME)[2].partition(b"\0")[0].decode(), client, server)
        with self._lock:
            self._links.add(link)
        # It may have come in while all others were being cut.
        if self._is_refusing():
            link.end()
            return
        for way in ("requests", "answers"):
            threading.Thread(target=self._pump, args=(link, way), daemon=True).start()

    def _pump(self, link: _Link, way: str) -> None:
        part = self._parts[link.part]
        is_request = way == "requests"
        source, sink = (link.client, link.server) if is_request else (link.server, link.client)
        flow = part.requests_flow if is_request else part.answers_flow
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_request:
                    self.requests[link.part] += data
                    if (fatal := self._fatal.get(link.part)) and fatal in data:
                        del self._fatal[link.part]
                        break
                if not flow.is_set():
                    self._held[link.part, way] += 1
                    flow.wait()
                    self._held[link.part, way] -= 1
                with self._lock:
                    is_alive = link in self._links
                if not is_alive:
                    break
                sink.sendall(data)
        with self._lock:
            self._links.discard(link)
        link.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()
        self.refuse()


def _read_start(client: socket.socket) -> bytes:
    """The message with which a connection begins."""
    while True:
        head = _read(client, 8)
        if int.from_bytes(head[4:]) not in _WISHES:
            return head + _read(client, int.from_bytes(head[:4]) - 8)
        client.sendall(b"N")


def _read(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = source.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data
