"""Who is at the other end of a Unix socket: a process of this container, or a user of another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers import PATIENCE, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("curl", "unshare"))),
    reason="needs root, to be two users, curl, and unshare for a namespace of its own",
)
LISTENER = """
import asyncio, sys
from tracker_daemon.daemon.connections import _peer
async def main():
    async def told(reader, writer):
        print(*_peer(writer.transport), sep=";", flush=True)
        writer.close()
    async with await asyncio.start_unix_server(told, sys.argv[1]) as server:
        await server.serve_forever()
asyncio.run(main())
"""


def callers(socket: Path, own_namespace: bool) -> list[tuple[str, str]]:
    """Return how two processes, of two users, are named by one that listens in a namespace of its own, or in theirs."""
    command = [sys.executable, "-c", LISTENER, str(socket)]
    if own_namespace:
        command = ["unshare", "--pid", "--fork", "--kill-child", *command]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(socket.exists, "the socket")
        socket.chmod(0o777)
        found = []
        for user in (None, 65534):
            # A program that any user may run; what it is answered is nothing.
            caller = subprocess.Popen(["curl", "--silent", "--unix-socket", str(socket), "http://x/"], user=user)
            caller.wait(PATIENCE)
            assert listener.stdout is not None
            name, _, port = listener.stdout.readline().strip().partition(";")
            found.append((name.replace(str(caller.pid), "PID"), port))
        return found
    finally:
        listener.kill()
        listener.communicate()


def test_of_this_container(server_folder: Path) -> None:
    """The process itself."""
    assert callers(server_folder / "peers", own_namespace=False) == [("process PID", "0")] * 2


def test_of_another_container(server_folder: Path) -> None:
    """Its user, where processes have no number; by the port others may have the name as well."""
    found = callers(server_folder / "peers_elsewhere", own_namespace=True)
    assert found == [("user 0 of a container", "1"), ("user 65534 of a container", "1")]
