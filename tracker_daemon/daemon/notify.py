"""What the service manager is told: systemd's notification protocol, a datagram with lines of text.

Source: sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import anyio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tracker_daemon.daemon.watched import Watched

_LOOK: Final = 1.0


async def tell_manager(watched: Watched) -> None:
    """Tell the manager READY, then what is the case whenever that changes, and signs of life, until cancelled.

    READY is told at once, be the database there or not: calls are taken, and what starts after this need not wait.
    """
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    watchdog, told, since = watchdog_seconds(), "", None
    notify("READY=1")
    while True:
        fault = watched.fault
        since = None if fault is None else since or datetime.fromtimestamp(watched.clock.wall(), UTC)
        if watched.draining:
            status = f"draining, {watched.waiting}"
        elif since is None:
            status = "ready"
        else:
            status = f"not ready since {since:%F %T} UTC, {watched.waiting}: {fault}"
        if status != told:
            told = status
            notify(f"STATUS={status}")
        if watchdog is not None:
            notify("WATCHDOG=1")
        await anyio.sleep(_LOOK if watchdog is None else min(watchdog, _LOOK))


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send *state* ("READY=1") where the manager asked for it; say whether there was one. Never raises."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.sendall(state.encode())
        return True
    return False


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return how often the manager wants a sign of life, with half of the time to spare; `None`: it does not."""
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdigit() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 2e6
