"""The image, from the Dockerfile as it stands: what is in it, and how it starts, answers and ends."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

from tests.deploy.manifests import ROOT
from tests.deploy.podman import DAEMON, PYTHON, eventually
from tests.deploy.stack import READ_ONLY, Stack, client, post, stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.podman import Podman

pytestmark = [
    pytest.mark.containers,
    pytest.mark.artefact("Dockerfile", "podman", "buildah", "runc"),
]

# Of the layers above the base image; what the README says, and some.
MOST_BYTES = 30_000_000


@pytest.fixture(scope="module")
def system(podman: Podman, daemon_image: str, postgres_image: str) -> Iterator[Stack]:
    """A Postgres with the tables."""
    with stack(podman, daemon_image, postgres_image, "image") as found:
        yield found


@pytest.fixture
def folder(podman: Podman) -> Iterator[Path]:
    """A folder for the socket, with a short path."""
    folder = podman.run_folder / "socket"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_configuration(podman: Podman, daemon_image: str) -> None:
    """A user by number who is not root, an entrypoint in exec form, SIGTERM, a health check of one word, labels."""
    found = podman.inspect(daemon_image, "image")
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["tracker-daemon"], ["serve"])
    assert config["StopSignal"] == "SIGTERM"
    assert found["Healthcheck"]["Test"] == ["CMD", "tracker-daemon-health"]
    assert set(config["Volumes"]) == {"/var/lib/tracker", "/run/tracker-daemon"}
    assert config["Labels"]["org.opencontainers.image.title"] == "tracker-daemon"
    assert config["Labels"]["org.opencontainers.image.version"] == version("tracker-daemon")
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"


def test_size(podman: Podman, daemon_image: str, record_property: pytest.RecordProperty) -> None:
    """What the image adds to its base is small."""
    added = podman.inspect(daemon_image, "image")["Size"] - podman.inspect(PYTHON, "image")["Size"]
    record_property("bytes above the base image", added)
    print(f"the image adds {added / 1e6:.1f} MB to its base")  # noqa: T201 - for the run's output
    assert added < MOST_BYTES


def test_content(podman: Podman, daemon_image: str) -> None:
    """Nobody special runs it; there is no compiler, no source and no pip of its own; only the volumes are writable."""
    script = """
    id -u; id -g
    command -v gcc cc c++ make
    ls -d /src /wheels /dist /opt/tracker/lib/python3*/site-packages/pip
    find / -xdev -perm /6000 -newer /opt/tracker/bin/python -type f
    for each in / /tmp /var/tmp /opt/tracker /etc /var/lib/tracker /run/tracker-daemon; do
        touch "$each/written" && echo "may write in $each"
    done
    tracker-daemon --version
    """
    output = podman(
        "run",
        "--pull",
        "never",
        "--rm",
        *READ_ONLY,
        "--entrypoint",
        "sh",
        daemon_image,
        "-c",
        f"({script}) 2>/dev/null",
    )
    assert output.splitlines() == [
        "10001",
        "10001",
        "may write in /var/lib/tracker",
        "may write in /run/tracker-daemon",
        "tracker-daemon 0.1.0",
    ]


def test_wrong_setting(podman: Podman, daemon_image: str) -> None:
    """A misspelt setting stops the start with status 2 and its name."""
    done = podman.try_("run", "--pull", "never", "--rm", "--env", "TRACKER_DATABSE=x", daemon_image)
    assert done.returncode == 2
    assert "did you mean TRACKER_DATABASE?" in done.stderr


def test_health(system: Stack, folder: Path) -> None:
    """The image's own health check says healthy while it can write, and unhealthy while the database is away."""
    podman = system.podman
    with system.daemon("health", folder=folder) as name:
        eventually(lambda: podman.healthy(name), "the health check")
        podman("stop", "--time", "20", system.postgres)
        try:
            eventually(lambda: not podman.healthy(name), "a health check that fails")
            with client(folder) as asking:
                assert asking.get("/livez").status_code == 200
        finally:
            podman("start", system.postgres)
        eventually(lambda: podman.healthy(name), "the health check")


def test_sigterm_drains(system: Stack, folder: Path) -> None:
    """SIGTERM right after a thousand accepted turns: all of them are in the table, and the exit status is 0."""
    before = system.turns()
    with system.daemon("drain", "--env=TRACKER_FLUSH_INTERVAL=30", folder=folder) as name:
        post(folder, 1_000)
        assert system.turns() == before, "nothing is flushed yet"
        system.podman("stop", "--time", "50", name)
        state = system.podman.inspect(name)["State"]
        lines = [json.loads(line) for line in system.podman.log(name).splitlines() if line.startswith("{")]
    assert state["ExitCode"] == 0, lines
    assert system.turns() == before + 1_000
    assert lines


def test_journal_outlives_the_container(system: Stack, folder: Path) -> None:
    """With the database away, SIGTERM leaves the calls in the volume and exits with 0; the next container applies them."""
    podman, before = system.podman, system.turns()
    with podman.volume("journal") as volume:
        words = (f"--volume={volume}:/var/lib/tracker", "--env=TRACKER_JOURNAL=/var/lib/tracker/journal")
        with system.daemon("first", *words, "--env=TRACKER_SHUTDOWN_TIMEOUT=1", folder=folder) as name:
            post(folder, 10, wait=True)
            podman("stop", "--time", "20", system.postgres)
            try:
                post(folder, 500)
                podman("stop", "--time", "30", name)
                state, log = podman.inspect(name)["State"], podman.log(name)
            finally:
                podman("start", system.postgres)
        assert state["ExitCode"] == 0, log
        eventually(lambda: podman.try_("exec", system.postgres, "pg_isready").returncode == 0, "Postgres")
        assert system.turns() == before + 10
        with system.daemon("second", *words, folder=folder):
            eventually(lambda: system.turns() == before + 510, "the journal's calls")


def test_kill_loses_nothing(system: Stack, folder: Path) -> None:
    """After SIGKILL the next container with the same volume applies what was accepted, once."""
    podman, before = system.podman, system.turns()
    with podman.volume("killed") as volume:
        words = (f"--volume={volume}:/var/lib/tracker", "--env=TRACKER_JOURNAL=/var/lib/tracker/journal")
        with system.daemon("killed", *words, "--env=TRACKER_FLUSH_INTERVAL=30", folder=folder) as name:
            post(folder, 300)
            podman("kill", name)
            eventually(lambda: not podman.inspect(name)["State"]["Running"], "the end")
        with system.daemon("after", *words, folder=folder):
            eventually(lambda: system.turns() >= before + 300, "the journal's calls")
            post(folder, 1, wait=True)
    assert system.turns() == before + 301


def test_embedded(podman: Podman, daemon_image: str) -> None:
    """The image of `--target embedded` needs nothing else: it is ready by itself, takes traffic, and ends with 0."""
    image = f"{DAEMON}-embedded"
    assert image != daemon_image
    podman.build(ROOT, image, "--target", "embedded")
    database = "--env=TRACKER_DATABASE=embedded:/var/lib/tracker/postgres"
    with podman.container("embedded", *READ_ONLY, "--cap-drop=ALL", database, image) as name:
        eventually(lambda: podman.healthy(name), "the daemon")
        traffic = ("demo", "--daemon", "unix:/run/tracker-daemon/tracker.sock", "--seconds", "1", "--rate", "200")
        assert "APPLIED" in podman("exec", "--env", "TRACKER_DATABASE=", name, "tracker-daemon", *traffic)
        podman("stop", "--time", "50", name)
        assert podman.inspect(name)["State"]["ExitCode"] == 0, podman.log(name)
