"""A NATS cluster on the loopback: real servers, killed and started by their process numbers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

_CONFIGURATION = """\
server_name: "{name}"
listen: "127.0.0.1:{port}"
jetstream {{
  store_dir: "{folder}"
  max_memory_store: 64MB
  max_file_store: {size}
  sync_interval: {sync}
}}
cluster {{
  name: "tracker"
  listen: "127.0.0.1:{route}"
  routes: [{routes}]
}}
"""


def program() -> str:
    """Return the path of the server's program, which the development extra installs beside Python."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is missing: pip install 'tracker-daemon[dev]'"
    return found


def _free_ports(number: int) -> list[int]:
    # All held until all are known, so that none is handed out twice.
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


class Cluster:
    """*nodes* servers that replicate to each other.

    Args:
        folder: for their files.
        nodes: how many.
        sync: when a server syncs its files: "always", or a time as its configuration has it.
        size: of its store.
    """

    def __init__(self, folder: Path, nodes: int = 3, *, sync: str = "always", size: str = "64GB") -> None:
        self._folder = folder
        ports = _free_ports(2 * nodes)
        self.ports, routes = ports[:nodes], ports[nodes:]
        self.names = [f"n{number}" for number in range(nodes)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * nodes
        for number, name in enumerate(self.names):
            (folder / name).mkdir(parents=True)
            text = _CONFIGURATION.format(
                name=name,
                port=self.ports[number],
                folder=folder / name,
                size=size,
                sync=sync,
                route=routes[number],
                routes=", ".join(f'"nats://127.0.0.1:{each}"' for each in routes),
            )
            if nodes == 1:
                text = text.partition("cluster {")[0]
            (folder / f"{name}.conf").write_text(text)

    @property
    def servers(self) -> str:
        """The servers, as a stream's URL has them."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def url(self, name: str) -> str:
        """Return the URL of the stream *name*."""
        return f"nats://{self.servers}/{name}"

    def start(self, *numbers: int) -> None:
        """Start those servers, or all that do not run."""
        for number in numbers or range(len(self.names)):
            process = self._processes[number]
            if process is None or process.poll() is not None:
                with (self._folder / f"n{number}.log").open("ab") as log:
                    self._processes[number] = subprocess.Popen(
                        [program(), "-c", str(self._folder / f"n{number}.conf")], stdout=log, stderr=log
                    )

    def kill(self, *numbers: int, number: int = signal.SIGKILL) -> None:
        """Kill those servers, or all, at once."""
        for each in numbers or range(len(self.names)):
            if (process := self._processes[each]) is not None and process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        for each in numbers or range(len(self.names)):
            if (process := self._processes[each]) is not None:
                process.wait(30)

    def pids(self) -> list[int]:
        """Return the process numbers of the servers that run."""
        return [each.pid for each in self._processes if each is not None and each.poll() is None]

    def answers(self, number: int) -> bool:
        """Say whether that server takes connections."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.ports[number]), 1.0):
            return True
        return False

    def __enter__(self) -> Self:
        self.start()
        deadline = monotonic() + 30
        for number in range(len(self.names)):
            while not self.answers(number):
                assert monotonic() < deadline, (self._folder / f"n{number}.log").read_text()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.names)))
