"""The unit for systemd: well-formed and hardened by systemd's own tools, and its settings start the daemon."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from tests.deploy.tools import DEPLOY, ROOT, run, systemd_analyze
from tests.helpers import running, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.artefact("deploy/systemd", "systemd-analyze")
FOLDER = DEPLOY / "systemd"
TEXT = (FOLDER / "tracker-daemon.service").read_text(encoding="utf-8")


def _values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", TEXT, re.MULTILINE)


def _environment() -> dict[str, str]:
    pairs = (pair.partition("=") for line in _values("Environment") for pair in shlex.split(line))
    return {name: value for name, _, value in pairs}


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that exists."""
    [command] = _values("ExecStart")
    file = tmp_path / "tracker-daemon.service"
    file.write_text(TEXT.replace(command.split()[0], shutil.which("true") or "/bin/true"))
    return file


def test_verify(unit: Path) -> None:
    """The tool has nothing to say about it: a value that it does not take is a line of output, and status 0."""
    got = run(systemd_analyze(), "verify", "--man=no", unit)
    assert (got.returncode, got.stdout) == (0, "")


def test_a_fault_is_found(unit: Path) -> None:
    """A value that systemd does not take makes the check above fail."""
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=strickt"))
    assert "strickt" in run(systemd_analyze(), "verify", "--man=no", unit).stdout


def test_exposure(unit: Path) -> None:
    """`systemd-analyze security` gives less than 2.0."""
    got = run(systemd_analyze(), "security", "--offline=true", "--threshold=20", "--no-pager", unit)
    assert got.returncode == 0, got.stdout
    found = re.search(r"exposure level for tracker-daemon\.service: ([\d.]+)", got.stdout)
    assert found is not None
    assert float(found[1]) < 2.0


def test_stop_waits_for_the_drain() -> None:
    """The stop waits for longer than the drain may take: two parts of shutdown_timeout, the linger, the last answers."""
    [stop] = _values("TimeoutStopSec")
    environment = _environment()
    assert int(stop) >= 2 * int(environment["TRACKER_SHUTDOWN_TIMEOUT"]) + int(environment["TRACKER_LINGER"]) + 10


def test_credentials_are_loaded() -> None:
    """Each credential that a setting names is loaded, and none else."""
    loaded = {value.partition(":")[0] for value in _values("LoadCredential")}
    named = {value.removeprefix("%d/") for value in _environment().values() if value.startswith("%d/")}
    assert loaded == named == {"database", "token"}


def test_its_settings_start_the_daemon(database: str, server_folder: Path) -> None:
    """The command and the environment of the unit, in other places: READY, signs of life, STOPPING, exit 0."""
    place = server_folder / "unit"
    place.mkdir()
    (place / "database").write_text(f"{database}\n")
    (place / "token").write_text("a token of this test's\n")
    places = {"%d/": f"{place}/", "/run/tracker-daemon/": f"{place}/", "/var/lib/tracker-daemon/": f"{place}/"}
    environment = _environment()
    for name, value in environment.items():
        for before, after in places.items():
            value = value.replace(before, after)  # noqa: PLW2901
        environment[name] = re.sub(r"(127\.0\.0\.1):\d+", r"\1:0", value)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(60)
        environment |= {"NOTIFY_SOCKET": str(place / "notify"), "WATCHDOG_USEC": "200000", "PYTHONPATH": str(ROOT)}
        [command] = _values("ExecStart")
        with running([sys.executable, "-m", "tracker_daemon", *command.split()[1:]], environment) as program:
            assert "READY=1" in manager.recv(1_000).decode().splitlines()
            assert manager.recv(1_000) == b"WATCHDOG=1"
            assert manager.recv(1_000) == b"WATCHDOG=1"
            assert (place / "tracker.sock").is_socket()
            assert (place / "journal").is_dir()
            program.process.terminate()
            wait_until(lambda: manager.recv(1_000) == b"STOPPING=1", "STOPPING=1")
            assert program.end().returncode == 0, program.errors
