"""What can be seen of a server from outside, without libpq: by its socket, its ports and its pid file."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from pathlib import Path

SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103


def fits_socket(folder: Path) -> bool:
    """Tell whether a socket in *folder* has a path that the kernel, the server and libpq take."""
    return len(os.fsencode(folder / ".s.PGSQL.65535")) <= SOCKET_PATH_BYTES and "," not in str(folder)


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(path: Path) -> bool:
    """Tell whether the server on the Unix socket *path* lets `postgres` in; no libpq, so no PG* variables."""
    names = b"user\0postgres\0database\0postgres\0\0"
    reply = b""
    with socket.socket(socket.AF_UNIX) as link, contextlib.suppress(OSError):
        link.settimeout(1.0)
        link.connect(str(path))
        link.sendall(struct.pack("!ii", 8 + len(names), 3 << 16) + names)
        while not reply.endswith(b"Z\0\0\0\5I") and (more := link.recv(4096)):
            reply += more
        link.sendall(b"X\0\0\0\4")
    return reply.startswith(b"R")


def live_server(data: Path) -> tuple[int, str] | None:
    """Return pid and status of the postmaster on *data*, or None; a process with a dead one's pid is none."""
    try:
        lines = (data / "postmaster.pid").read_text(errors="replace").splitlines()
        pid, status = abs(int(lines[0])), lines[7].strip() if len(lines) > 7 else "starting"
        if sys.platform == "linux":
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")  # world-readable; empty in a zombie
            named = Path(os.fsdecode(words[0])).name in ("postgres", "postmaster")
            if not named or not Path(os.fsdecode(words[words.index(b"-D") + 1])).samefile(data):
                return None
        else:
            os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid, status
