"""The unit for systemd: well-formed and hardened by systemd's own tools, and its settings start the daemon."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.daemon.harness import Manager
from tests.deploy.guides import Guide
from tests.deploy.tools import DEPLOY, ROOT, run, systemd_analyze
from tests.helpers import running
from tracker_daemon.cli import program

pytestmark = pytest.mark.artefact("deploy/systemd", "systemd-analyze")
FOLDER = DEPLOY / "systemd"
UNITS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.service"))}
DAEMON = "tracker-daemon"


def _values(name: str, unit: str = DAEMON) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNITS[unit], re.MULTILINE)


def _environment(unit: str = DAEMON) -> dict[str, str]:
    pairs = (pair.partition("=") for line in _values("Environment", unit) for pair in shlex.split(line))
    return {name: value for name, _, value in pairs}


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit, with a program that exists."""
    [command] = _values("ExecStart", request.param)
    file = tmp_path / f"{request.param}.service"
    file.write_text(UNITS[request.param].replace(command.split()[0], shutil.which("true") or "/bin/true"))
    return file


def test_lines_are_short() -> None:
    """They can be read in a terminal: 120 columns are enough."""
    lines = [line for file in FOLDER.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if len(line) > 120] == []


def test_installed_as_the_page_says(empty_database: str, tmp_path: Path) -> None:
    """The page's commands, in another root: user, files and tables are there, and the units name what was installed."""
    sysusers = shutil.which("systemd-sysusers")
    if sysusers is None:
        pytest.skip("no systemd-sysusers on PATH (Debian: apt-get install systemd)")
    root, ours = tmp_path / "root", tmp_path / "ours"
    for place in (ours, *(root / name for name in ("opt", "etc/systemd/system", "usr/local/bin"))):
        place.mkdir(parents=True)
    # What is installed into the environment is the page's affair, and pip's; here it is that it goes there.
    venv = '[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$(dirname "$0")/pip" "$3/bin/pip"'
    pip = '[ "$1" = install ] && echo "$2" >"$(dirname "$0")/tracker-daemon"'
    for name, script in (("python3", venv), ("pip", pip)):
        (ours / name).write_text(f"#!/bin/sh\n{script}\n")
        (ours / name).chmod(0o755)
    places = {f"{name}/": f"{root}{name}/" for name in ("/opt", "/etc", "/usr/local")}
    places |= {"deploy/systemd/": f"{FOLDER}/", "systemd-sysusers\n": f"{sysusers} --root={root}\n"}
    with Guide("../deploy/systemd/README.md", tmp_path, ours, places) as guide:
        guide.step("python3 -m venv")
        secrets = root / "etc/tracker-daemon"
        assert {(file.name, stat.S_IMODE(file.stat().st_mode)) for file in secrets.iterdir()} == {
            (name, 0o600) for name in ("owner", "database", "token")
        }
        (secrets / "owner").write_text(empty_database)
        assert "applied 0001_tables" in guide.step("TRACKER_DATABASE_FILE")
        guide.step("install")
    assert "tracker-daemon:" in (root / "etc/passwd").read_text()
    for unit, text in UNITS.items():
        assert (root / f"etc/systemd/system/{unit}.service").read_text() == text
        loaded = [value.partition(":")[2] for value in _values("LoadCredential", unit)]
        [command] = _values("ExecStart", unit)
        for file in (*loaded, command.split()[0]):
            assert Path(f"{root}{file}").exists(), f"{unit}: {file}"
    extras = (root / "opt/tracker-daemon/bin/tracker-daemon").read_text()
    assert (root / "usr/local/bin/tracker-daemon").readlink() == root / "opt/tracker-daemon/bin/tracker-daemon"
    assert extras == ".[daemon,nats]\n"  # what `serve` and `consume` ask for when it is not there


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
    found = re.search(rf"exposure level for {unit.name}: ([\d.]+)", got.stdout)
    assert found is not None
    assert float(found[1]) < 2.0


def test_stop_waits_for_the_drain() -> None:
    """The stop waits for longer than the drain may take: two parts of shutdown_timeout, the linger, the last answers."""
    [stop] = _values("TimeoutStopSec")
    environment = _environment()
    assert int(stop) >= 2 * int(environment["TRACKER_SHUTDOWN_TIMEOUT"]) + int(environment["TRACKER_LINGER"]) + 10


@pytest.mark.parametrize(
    ("name", "secrets"), [(DAEMON, {"database", "token"}), ("tracker-consumer", {"database", "stream"})]
)
def test_credentials_are_loaded(name: str, secrets: set[str]) -> None:
    """Each credential that a setting names is loaded, and none else."""
    loaded = {value.partition(":")[0] for value in _values("LoadCredential", name)}
    named = {value.removeprefix("%d/") for value in _environment(name).values() if value.startswith("%d/")}
    assert loaded == named == secrets


def test_settings_of_the_consumer() -> None:
    """Each is a setting of its command, or the file of one."""
    [command] = _values("ExecStart", "tracker-consumer")
    options = program.commands[command.split()[1]].params
    known = {variable for option in options for variable in [option.envvar] if isinstance(variable, str)}
    assert {name.removesuffix("_FILE") for name in _environment("tracker-consumer")} <= known


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
    with Manager(str(place / "notify")) as manager:
        environment |= {**manager.environment, "PYTHONPATH": str(ROOT)}
        [command] = _values("ExecStart")
        with running([sys.executable, "-m", "tracker_daemon", *command.split()[1:]], environment) as started:
            assert manager.hears() == "READY=1"
            manager.hears_until("STATUS=ready")
            assert [manager.hears(), manager.hears()] == ["WATCHDOG=1"] * 2
            assert (place / "tracker.sock").is_socket()
            assert (place / "journal").is_dir()
            started.process.terminate()
            manager.hears_until("STOPPING=1")
            assert started.end().returncode == 0, started.errors
