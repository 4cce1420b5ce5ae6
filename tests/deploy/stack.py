"""A Postgres in a container with the tables in it, and daemons beside it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx

from tests.deploy.podman import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.podman import Podman

BEARER: Final = "bearer-of-the-test"
_WORD: Final = "word-of-the-test"
UID: Final = 10001
READ_ONLY: Final = ("--read-only", "--read-only-tmpfs=false")
"""As Docker and Kubernetes understand it: podman would leave /tmp writable."""


@dataclass(frozen=True)
class Stack:
    """A network, a Postgres on it, and the files that a daemon gets as secrets."""

    podman: Podman
    image: str
    network: str
    postgres: str
    secrets: Path
    address: str
    """Of Postgres, fixed: the name of a container that is away is asked of servers that may not answer."""

    def sql(self, statement: str) -> str:
        """Return what psql answers in the Postgres container."""
        return self.podman("exec", self.postgres, "psql", "-U", "chat", "-d", "chat", "-At", "-c", statement)

    def turns(self) -> int:
        """Return how many turns the table shows."""
        return int(self.sql("SELECT coalesce(sum(turn_count), 0) FROM conversations"))

    @contextmanager
    def daemon(self, name: str, *words: str | Path, folder: Path) -> Iterator[str]:
        """Run the daemon as in production, with a read-only root; give its name once it answers."""
        folder.mkdir(exist_ok=True)
        os.chown(folder, UID, UID)
        settings = {
            "TRACKER_DATABASE_FILE": "/etc/tracker-daemon/database",
            "TRACKER_TOKEN_FILE": "/etc/tracker-daemon/token",
            "TRACKER_LISTEN": "unix:/run/tracker-daemon/tracker.sock 0.0.0.0:8080",
            "TRACKER_LOG_FORMAT": "json",
        }
        options = [f"--env={key}={value}" for key, value in settings.items()]
        with self.podman.container(
            name,
            *READ_ONLY,
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--network={self.network}",
            f"--add-host={self.postgres}:{self.address}",
            f"--volume={self.secrets}:/etc/tracker-daemon:ro",
            f"--volume={folder}:/run/tracker-daemon",
            *options,
            *words,
            self.image,
        ):
            eventually(lambda: live(folder), f"the daemon:\n{self.podman.log(name)}")
            yield name


def client(folder: Path) -> httpx.Client:
    """Return a client of the daemon whose socket is in *folder*."""
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(folder / "tracker.sock")),
        base_url="http://localhost",
        headers={"authorization": f"Bearer {BEARER}"},
    )


def live(folder: Path) -> bool:
    """Say whether the daemon listens at the socket in *folder*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        return asking.connect_ex(str(folder / "tracker.sock")) == 0


def post(folder: Path, turns: int, *, wait: bool = False) -> None:
    """Send so many turns."""
    lines = "\n".join(
        json.dumps({"call": "record_turn", "thread_id": f"t-{number % 50}", "tokens": 1}) for number in range(turns)
    )
    with client(folder) as asking:
        answer = asking.post("/v1/calls", params={"wait": "committed"} if wait else {}, content=lines)
    assert answer.status_code == (200 if wait else 202), answer.text


@contextmanager
def stack(podman: Podman, image: str, postgres_image: str, name: str) -> Iterator[Stack]:
    """Start a Postgres and migrate it."""
    secrets = podman.folder / f"secrets-{name}"
    shutil.rmtree(secrets, ignore_errors=True)
    secrets.mkdir()
    server = f"{name}-postgres"
    for file, text in {
        "database": f"postgresql://chat:{_WORD}@{server}/chat",
        "token": BEARER,
        "password": _WORD,
    }.items():
        (secrets / file).write_text(f"{text}\n", encoding="utf-8")
    mount = f"--volume={secrets}:/etc/tracker-daemon:ro"
    with (
        podman.network(name) as network,
        podman.container(
            server,
            f"--network={network}",
            f"--ip={podman.fixed_address(network)}",
            "--mac-address=92:d0:c6:0a:29:33",  # that it is the same after a restart: neighbours remember it
            f"--volume={secrets}:/run/secrets:ro",
            "--env=POSTGRES_USER=chat",
            "--env=POSTGRES_DB=chat",
            "--env=POSTGRES_PASSWORD_FILE=/run/secrets/password",
            postgres_image,
        ),
    ):
        eventually(lambda: podman.try_("exec", server, "pg_isready").returncode == 0, "Postgres")
        once = ("run", "--pull", "never", "--rm", *READ_ONLY, f"--network={network}", mount)
        environment = "--env=TRACKER_DATABASE_FILE=/etc/tracker-daemon/database"
        podman(*once, environment, image, "migrate")
        yield Stack(podman, image, network, server, secrets, podman.address(server))
