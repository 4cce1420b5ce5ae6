"""Asking a daemon whether it is ready, for container health checks: the standard library alone."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracker_daemon.daemon.options import Listen


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(address: Listen, timeout: float) -> tuple[bool, str]:
    """Return whether the daemon at *address* is ready, and a line that says so or why not."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - asked, not bound
    connection = (
        http.client.HTTPConnection(host, address.port, timeout=timeout)
        if address.path is None
        else _Unix(str(address.path), timeout)
    )
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        value = json.loads(answer.read(65_536))
        reason = value.get("reason") or value.get("error") or ""
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error or type(error).__name__
        return False, f"{address} does not answer: {why}"
    finally:
        connection.close()
    if answer.status == 200:
        return True, f"{address} is ready"
    return False, f"{address} is not ready: {' '.join(str(reason).split())}"
