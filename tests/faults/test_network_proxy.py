"""The proxy itself: each fault does what it says, to both sides."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.faults.network import Proxy
from tests.support.waiting import wait_until


class Echo:
    """A server that sends back what it gets, and keeps it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = f"host=127.0.0.1 port={self._listener.getsockname()[1]}"
        self.heard = b""
        self.ended: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(4096):
                    self.heard += data
                    with contextlib.suppress(BrokenPipeError):
                        peer.sendall(data)
                self.ended.append("end of stream")
            except ConnectionResetError:
                self.ended.append("reset")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.dsn) as proxy:
        yield proxy


@contextlib.contextmanager
def _connected(proxy: Proxy) -> Iterator[socket.socket]:
    port = int(proxy.dsn.rpartition("port=")[2].split()[0])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        yield client


def _ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    got = b""
    while len(got) < len(data):
        more = client.recv(4096)
        assert more, "the connection ended"
        got += more
    return got


def _is_silent(client: socket.socket) -> bool:
    """Whether nothing comes for a moment, no end either."""
    client.settimeout(0.2)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)
    return False


def test_what_is_held_arrives_late_and_in_order(proxy: Proxy, echo: Echo) -> None:
    with _connected(proxy) as client:
        assert _ask(client, b"1") == b"1"
        proxy.hold()
        client.sendall(b"2")
        client.sendall(b"3")
        assert _is_silent(client)
        assert echo.heard == b"1"
        proxy.flow()
        got = b""
        while len(got) < 2:
            got += client.recv(4096)
        assert got == echo.heard[1:] == b"23"


def test_what_is_swallowed_is_gone_and_its_connection_silent_for_ever(proxy: Proxy, echo: Echo) -> None:
    with _connected(proxy) as old, _connected(proxy) as quiet, _connected(proxy) as left:
        for client in (old, quiet, left):
            assert _ask(client, b".") == b"."
        proxy.swallow()
        with _connected(proxy) as made_meanwhile:
            old.sendall(b"lost")
            left.close()
            made_meanwhile.sendall(b"lost")
            wait_until(lambda: proxy.swallowed == 8)
            proxy.flow()
            assert _ask(quiet, b"2") == b"2"
            with _connected(proxy) as new:
                assert _ask(new, b"3") == b"3"
            for client in (old, made_meanwhile):
                client.sendall(b"lost")
                assert _is_silent(client)
        wait_until(lambda: echo.heard == b"...23")
        # The new one's alone: nobody was told of the other ends.
        wait_until(lambda: echo.ended)
        assert echo.ended == ["end of stream"]


def test_swallowing_ends_by_itself(proxy: Proxy) -> None:
    proxy.swallow(0.3)

    def is_back() -> bool:
        with _connected(proxy) as client:
            client.settimeout(0.2)
            return _ask(client, b"x") == b"x"

    wait_until(is_back)


def test_a_delay_is_one_of_time_and_not_of_order_or_rate(proxy: Proxy) -> None:
    with _connected(proxy) as client:
        proxy.delay(100)
        began = time.monotonic()
        assert _ask(client, b"x") == b"x"
        took = time.monotonic() - began
        assert took >= 0.2
        began = time.monotonic()
        for n in range(20):
            client.sendall(b"%02d" % n)
            # So that they are pieces of their own.
            over = time.monotonic() + 0.01
            wait_until(lambda over=over: time.monotonic() >= over)  # type: ignore[misc]
        got = b""
        while len(got) < 40:
            got += client.recv(4096)
        assert got == b"".join(b"%02d" % n for n in range(20))
        # Not 20 delays one after the other.
        assert time.monotonic() - began < 3.5
        proxy.delay(0)
        assert _ask(client, b"y") == b"y"


def test_a_reset_is_one_for_both_sides(proxy: Proxy, echo: Echo) -> None:
    with _connected(proxy) as client:
        assert _ask(client, b"x") == b"x"
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        wait_until(lambda: echo.ended == ["reset"])
        with _connected(proxy) as new:
            assert _ask(new, b"y") == b"y"


def test_a_half_close_of_answers_lets_requests_through(proxy: Proxy, echo: Echo) -> None:
    with _connected(proxy) as client:
        assert _ask(client, b"x") == b"x"
        assert proxy.half_close("answers") == 1
        assert client.recv(1) == b""
        client.sendall(b"y")
        wait_until(lambda: echo.heard == b"xy")


def test_a_half_close_of_requests_is_the_servers_end_of_stream(proxy: Proxy, echo: Echo) -> None:
    with _connected(proxy) as client:
        assert _ask(client, b"x") == b"x"
        assert proxy.half_close("requests") == 1
        wait_until(lambda: echo.ended == ["end of stream"])
        assert client.recv(1) == b""


def test_who_is_refused_is_let_in_later(proxy: Proxy) -> None:
    proxy.refuse()
    with _connected(proxy) as client:
        assert client.recv(1) == b""
    proxy.accept()
    with _connected(proxy) as client:
        assert _ask(client, b"x") == b"x"
