"""A TCP proxy in front of PostgreSQL that loses what a test wants lost: answers, requests, or the whole connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Proxy:
    """Listens on loopback. `dsn` leads through it to the database of the DSN it was given."""

    def __init__(self, dsn: str) -> None:
        given = conninfo_to_dict(dsn)
        host, port = str(given.get("host") or "127.0.0.1"), int(str(given.get("port") or 5432))
        self._target: str | tuple[str, int] = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=str(self._listener.getsockname()[1]))
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._answers_flow = threading.Event()
        self._requests_flow = threading.Event()
        self._answers_flow.set()
        self._requests_flow.set()
        self._is_open = True
        self._lose: tuple[bytes, bool, bool] | None = None
        self.connections = 0
        """How many were made."""
        self.lost = 0
        """Requests that `lose_request` or `lose_answer_to` stopped."""
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_answers(self) -> None:
        """From now on the server's answers stay in the proxy; requests go through."""
        self._answers_flow.clear()

    def hold_requests(self) -> None:
        """From now on requests stay in the proxy."""
        self._requests_flow.clear()

    def lose_request(self, marker: bytes) -> None:
        """The next request that holds `marker` never arrives: its connection ends instead."""
        self._lose = (marker, True, False)

    def lose_answer_to(self, marker: bytes, *, then_refuse: bool = False) -> None:
        """The next request that holds `marker` arrives and is served to its end, and its answer is lost with the connection."""
        self._lose = (marker, False, then_refuse)

    def cut(self) -> None:
        """Ends all connections and forgets what was held; new ones flow again."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _end(*pair)
        self._answers_flow.set()
        self._requests_flow.set()

    def refuse(self) -> None:
        """Ends all connections, and every new one."""
        self._is_open = False
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._is_open:
                client.close()
                continue
            if isinstance(self._target, str):
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
            else:
                server = socket.create_connection(self._target)
            with self._lock:
                self._pairs.append((client, server))
                self.connections += 1
            for source, sink, flow in ((client, server, self._requests_flow), (server, client, self._answers_flow)):
                threading.Thread(target=self._pump, args=(source, sink, flow), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, flow: threading.Event) -> None:
        is_request = flow is self._requests_flow
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                flow.wait()
                if is_request and self._lose is not None and self._lose[0] in data:
                    if self._lose_one(source, sink, data):
                        # The other direction's thread ends both when the server is through.
                        return
                    break
                with self._lock:
                    is_alive = any(source in pair for pair in self._pairs)
                if is_alive:
                    sink.sendall(data)
        _end(source, sink)

    def _lose_one(self, client: socket.socket, server: socket.socket, request: bytes) -> bool:
        """Loses the request, or the answer to it; True: it is served."""
        assert self._lose is not None
        _, is_request_lost, then_refuse = self._lose
        self._lose = None
        with self._lock:
            self._pairs = [pair for pair in self._pairs if client not in pair]
        self.lost += 1
        if then_refuse:
            self._is_open = False
        if is_request_lost:
            return False
        server.sendall(request)
        # The server serves what it has, then sees that nothing more will come, and ends.
        server.shutdown(socket.SHUT_WR)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()
        self.refuse()


def _end(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
