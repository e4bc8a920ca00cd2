"""A host whose resolver answers nobody: programs run in it find names out only by waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

#: Each of its look-ups takes so many seconds, then fails.
LOOK_UP_SECONDS: Final = 20

_RESOLV_CONF: Final = f"nameserver 127.0.0.1\noptions timeout:{LOOK_UP_SECONDS} attempts:1\n"
_NSSWITCH_CONF: Final = "hosts: dns\n"
# Loopback's switch: SIOCSIFFLAGS with IFF_UP | IFF_RUNNING. Then somebody listens on the port for names, and says nothing.
_WITHIN: Final = """
import fcntl, socket, struct, subprocess, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(udp, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
udp.bind(("127.0.0.1", 53))
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def run_without_names(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a command in network and mount namespaces of its own, in which there is nothing but that resolver.

    Raises:
        OSError: this system lets us make none (a test skips by that name).
    """
    unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
    if os.geteuid() != 0:
        unshare[1:1] = ["--user", "--map-root-user"]
    with tempfile.TemporaryDirectory() as folder:
        mounts = []
        for name, text in (("resolv.conf", _RESOLV_CONF), ("nsswitch.conf", _NSSWITCH_CONF)):
            file = Path(folder, name)
            file.write_text(text)
            mounts.append(f'mount --bind "{file}" "$(readlink -f /etc/{name})"')
        enter = [*unshare, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
        within = [*enter, sys.executable, "-c", _WITHIN]
        try:
            tried = subprocess.run([*within, "true"], check=False, capture_output=True, text=True, timeout=60)
        except FileNotFoundError as error:
            raise OSError(f"a resolver of one's own needs util-linux's unshare: {error}") from error
        if tried.returncode != 0:
            raise OSError(f"no namespaces can be made here: {tried.stderr.strip()}")
        return subprocess.run([*within, *command], check=False, capture_output=True, text=True, timeout=timeout)


__all__ = ["LOOK_UP_SECONDS", "run_without_names"]
