"""What a benchmark says of the server that it ran on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fastq._db import Database

#: With one of these off, a commit that was answered may be gone after a crash, and its rate is that of another thing.
_DURABILITY: Final = ("fsync", "full_page_writes", "synchronous_commit")


@dataclass(frozen=True, slots=True)
class Server:
    """The server's version, our rights, and its settings."""

    version: str
    is_embedded: bool
    is_superuser: bool
    settings: dict[str, str]

    @property
    def weakened(self) -> list[str]:
        """Settings that are off and cost durability."""
        return [name for name in _DURABILITY if self.settings[name] == "off"]


def read_server(db: Database, *, is_embedded: bool) -> Server:
    """Ask it. Raises DatabaseError."""
    [(version, is_superuser, *values)] = db.query("bench_server")
    names = (
        *_DURABILITY,
        "wal_level",
        "wal_compression",
        "max_wal_size",
        "checkpoint_timeout",
        "shared_buffers",
    )
    return Server(version, is_embedded, bool(is_superuser), dict(zip(names, values, strict=True)))


__all__ = ["Server", "read_server"]
