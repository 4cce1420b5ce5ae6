"""Who is at the other end of a Unix socket: a process of this container, or a user of another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.daemon.harness import ROOT, Daemon, turn
from tests.helpers import PATIENCE, query, running, wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("curl"), reason="needs root, to be two users, and curl"
)
OWN_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
NOBODY = 65534
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


@pytest.fixture
def _namespaces() -> None:
    """Skip, and say so, where no namespace of processes may be made, as in most containers."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on PATH (Debian: apt-get install util-linux)")
    tried = subprocess.run([*OWN_NAMESPACE, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a namespace of processes is forbidden here: {tried.stderr.strip()}")


def callers(socket: Path, own_namespace: bool) -> list[tuple[str, str]]:
    """Return how two processes, of two users, are named by one that listens in a namespace of its own, or in theirs."""
    command = [sys.executable, "-c", LISTENER, str(socket)]
    if own_namespace:
        command = [*OWN_NAMESPACE, *command]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(socket.exists, "the socket")
        socket.chmod(0o777)
        found = []
        for user in (None, NOBODY):
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


@pytest.mark.usefixtures("_namespaces")
def test_of_another_container(server_folder: Path) -> None:
    """Its user, where processes have no number; by the port others may have the name as well."""
    found = callers(server_folder / "peers_elsewhere", own_namespace=True)
    assert found == [("user 0 of a container", "1"), ("user 65534 of a container", "1")]


@pytest.mark.usefixtures("_namespaces")
def test_containers_of_one_user_have_one_share(database: str, server_folder: Path) -> None:
    """Who floods from another container leaves room for other users, and none for its own; but for who names a producer."""
    daemon = Daemon(database, server_folder)
    path = Path(daemon.path)
    command = [*OWN_NAMESPACE, sys.executable, "-m", "tracker_daemon", "serve", "--database", database]
    command += ["--listen", f"unix:{path}", "--max-pending", "400", "--flush-interval", "0.01"]
    numbers = count()

    def post(user: int, *options: str) -> subprocess.Popen[str]:
        """Post calls on ten new threads, by a process of its own; it prints the status."""
        body = "".join(turn(f"t-{next(numbers)}") for _ in range(10))
        arguments = ["--silent", "--unix-socket", str(path), "--output", os.devnull, "--write-out", "%{http_code}"]
        arguments += [*options, "--data-binary", body, "http://x/v1/calls"]
        return subprocess.Popen(["curl", *arguments], user=user, stdout=subprocess.PIPE, text=True)

    def status(process: subprocess.Popen[str]) -> str:
        return process.communicate(timeout=PATIENCE)[0]

    with running(command, {"PYTHONPATH": str(ROOT)}), psycopg.connect(database) as blocker:
        wait_until(path.exists, "the socket")
        path.chmod(0o777)
        wait_until(lambda: status(post(0)) == "202", "the start")
        wait_until(lambda: query(database, "SELECT count(*) FROM conversations") == [(10,)], "its first calls")
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        flood = next(number for number in count() if status(post(0)) == "429")
        assert flood > 10
        assert status(post(0)) == "429"
        assert [status(post(NOBODY)) for _ in range(3)] == ["202"] * 3
        named = post(0, "--header", f"Tracker-Producer: {uuid4()}", "--header", "Tracker-Sequence: 1")
        wait_until(lambda: daemon.metric("tracker_queue_calls") == 10 * (flood + 4), "the batch")
        blocker.rollback()
        assert status(named) == "202"
        wait_until(
            lambda: query(database, "SELECT count(*) FROM conversations") == [(10 * (flood + 5),)], "all of them"
        )
