"""A pgbouncer of the test's own, in transaction mode, in front of one server.

Rules:
1. It listens on a port of 127.0.0.1 that it keeps over a restart, and runs as the user that runs the server.
2. Anybody may connect, as anybody: it logs in at the server as `postgres`.
3. It lets go of a server that has left at once, and tries again ten times a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import psycopg

from tests.helpers import wait_until
from tracker_daemon.server_binaries import server_identity
from tracker_daemon.server_probes import free_port

if TYPE_CHECKING:
    from pathlib import Path

# Debian puts it where only root looks.
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])

CONFIG = """\
[databases]
* = host={host} port={server_port} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = somebody
pool_mode = transaction
default_pool_size = 1
server_login_retry = 0.1
"""


def find_pgbouncer() -> str | None:
    """Return the path of the program, or `None` where it is not installed."""
    return shutil.which("pgbouncer", path=PLACES)


class Pgbouncer:
    """A pool of one connection a database: `with Pgbouncer(folder, "127.0.0.1", port) as pooler`.

    folder: an existing one of its own, which the server's user may search.
    host, server_port: the server's.
    """

    def __init__(self, folder: Path, host: str, server_port: int) -> None:
        self._folder, self._host, self._server_port = folder, host, server_port
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def conninfo(self, database: str) -> str:
        """Return the conninfo of *database* through the pool."""
        return f"host=127.0.0.1 port={self._port} user=somebody dbname={database}"

    def start(self) -> None:
        """Start it and wait until it answers; on the same port as before, if it ran already."""
        program = find_pgbouncer()
        assert program is not None, "look with find_pgbouncer before"
        kept = self._port != 0

        def attempt() -> bool:
            if not kept:  # another process may take it first: then with a new one
                self._port = free_port()
            self._launch(program)
            wait_until(lambda: self._answers() or not self.running, "pgbouncer's answer")
            return self.running

        wait_until(attempt, "a pgbouncer that stays")

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def tell(self, command: str) -> list[Any]:
        """Run one command of its console."""
        with psycopg.connect(self.conninfo("pgbouncer"), autocommit=True) as console:
            cursor = console.execute(command)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has written since its last start."""
        return (self._folder / "pgbouncer.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def _launch(self, program: str) -> None:
        config = self._folder / "pgbouncer.ini"
        config.write_text(CONFIG.format(host=self._host, server_port=self._server_port, port=self._port))
        config.chmod(0o644)
        identity = server_identity()
        as_user: dict[str, Any] = {}
        if identity is not None:  # it refuses to run as root
            as_user = {"user": identity[0], "group": identity[1], "extra_groups": []}
        with (self._folder / "pgbouncer.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": os.defpath},
                start_new_session=True,
                **as_user,
            )

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            self.tell("SHOW VERSION")
            return True
        return False
