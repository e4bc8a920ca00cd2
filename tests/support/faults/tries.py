"""How often clients asked a server that said no, by its own log, and how often the law of their pauses lets them."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any, Final

from tests.support.faults.server import PrivateServer

#: Settings of a server whose log says who asked: each try to connect and each error, with the program's name.
SAYS_WHO: Final[dict[str, Any]] = {"log_connections": "on", "log_line_prefix": "<%a> "}
#: What the engine's connections call themselves ("fastq claimer").
_CONNECTED: Final = re.compile(r"LOG: +connection authorized: .* application_name=fastq (\w+)")


def most_tries(seconds: float) -> int:
    """How often one loop may try within so many seconds: at once, and then with pauses of 50 ms, doubling to 5 s, if the chance that
    cuts each of them by up to half always cuts as much as it may.
    """
    tries, pause, at = 1, 0.025, 0.025
    while at <= seconds:
        tries, pause = tries + 1, min(2 * pause, 2.5)
        at += pause
    return tries


class Tries:
    """What a server with the settings `SAYS_WHO` logged of tries since this was made."""

    def __init__(self, server: PrivateServer) -> None:
        self._log = server.log_path
        self._from = self._log.stat().st_size
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been counting."""
        return time.monotonic() - self._began

    def connections(self) -> Counter[str]:
        """How many were let in, by the engine's parts."""
        return Counter(_CONNECTED.findall(self._read()))

    def refusals(self, pattern: str) -> Counter[str]:
        """How many statements were refused with such a message, by the engine's parts."""
        return Counter(re.findall(rf"^<fastq (\w+)> ERROR: .*(?:{pattern})", self._read(), re.MULTILINE))

    def _read(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")
