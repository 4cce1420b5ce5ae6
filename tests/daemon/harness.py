"""A daemon in a process of its own, and what talks to it: requests, raw sockets, the lines of calls."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from tests.helpers import PATIENCE, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Daemon:
    """`tracker-daemon serve` in a process of its own; killed and started again as often as a test wants.

    Args:
        database: its URL.
        folder: where its socket is; short, for a socket's path is.
        options: further options of the command.
        environment: added to this process's own.
    """

    def __init__(self, database: str, folder: Path, *options: str, **environment: str) -> None:
        self.database, self.folder = database, folder
        self.port = next((int(each.rpartition(":")[2]) for each in options if each.startswith("127.0.0.1:")), None)
        self.path = str(folder / f"{uuid4().hex[:8]}.sock")
        self.options = options
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[str] = []
        self.lives = 0

    @property
    def url(self) -> str:
        """What a `Tracker` is given."""
        return f"unix:{self.path}"

    @property
    def arguments(self) -> list[str]:
        """The command."""
        listen = [] if "--listen" in self.options else ["--listen", self.url]
        return [
            sys.executable,
            "-m",
            "tracker_daemon",
            "serve",
            "--database",
            self.database,
            *listen,
            *self.options,
        ]

    def start(self, *, ready: bool = True) -> Self:
        """Run it; return when it is ready, or, with *ready* false, when it answers."""
        self.lines.append(f"-- life {self.lives}\n")
        self.lives += 1
        self.process = subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
            cwd=self.folder,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()
        wait_until(lambda: self._answers(ready=ready), "the daemon's start", 60)
        return self

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.lines.append(line)

    def _answers(self, *, ready: bool) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with suppress(OSError, http.client.HTTPException):
            return self.get("/readyz").status == 200 or not ready
        return False

    @property
    def log(self) -> str:
        """What it has said."""
        return "".join(self.lines)

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; return the exit status."""
        assert self.process is not None
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def stop(self) -> int:
        """End it by SIGTERM; return the exit status."""
        self.signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.end()

    # -- requests ----------------------------------------------------------------------------------

    def connection(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        """Return a connection, not yet made."""
        if self.port is not None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        return _Unix(self.path, timeout)

    def request(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send one request on a connection of its own; return the answer."""
        connection = self.connection()
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        """GET *path*."""
        return self.request("GET", path, headers=headers)

    def post(self, body: bytes | str, *, wait: bool = False, headers: Mapping[str, str] | None = None) -> Reply:
        """POST calls."""
        return self.request("POST", "/v1/calls" + ("?wait=committed" if wait else ""), body, headers)

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples, or the one that is named with its labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        begins = (name + " ", name + "{")
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(begins))

    def raw(self, timeout: float = PATIENCE) -> socket.socket:
        """Return a connected socket."""
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(timeout)
        found.connect(self.path)
        return found

    def says(self, text: str) -> None:
        """Wait until *text* stands in the log."""
        wait_until(lambda: text in self.log, f"{text!r} in the log")


class Manager:
    """What systemd is to a unit: a socket that hears what it is told. `environment` is where, and that it wants signs of life."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE)

    def hears(self) -> str:
        """Return the next that it is told."""
        return self._socket.recv(4_096).decode()

    def hears_until(self, pattern: str) -> list[str]:
        """Return what it is told until that matches *pattern*, and that as the last."""
        said = [self.hears()]
        wait_until(lambda: re.fullmatch(pattern, said[-1]) or said.append(self.hears()), f"{pattern!r} in {said}")
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="trk-") as name:
        yield Path(name)


@contextmanager
def serving(database: str, *options: str, ready: bool = True, **environment: str) -> Iterator[Daemon]:
    """Run a daemon for as long as the block; it never outlives it."""
    with socket_folder() as folder:
        daemon = Daemon(database, folder, *options, **environment)
        try:
            yield daemon.start(ready=ready)
        finally:
            daemon.kill()


def turn(thread_id: str = "t", **fields: Any) -> str:
    """Return the line of one turn."""
    return json.dumps({"call": "record_turn", "thread_id": thread_id, **fields}) + "\n"


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the other side closes."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)
