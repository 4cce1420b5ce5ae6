"""What deploy/stream has: the brokers' configuration makes a cluster, and the consumers' settings are settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.helpers import wait_until
from tests.stream.cluster import _free_ports, program
from tests.stream.conftest import make_stream
from tracker_daemon.cli import _variables
from tracker_daemon.cli import program as command_line
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "stream"
COMPOSE = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
BROKERS = ("n1", "n2", "n3")
LOGIN = "broker:example@"


def changed(file: Path, *changes: tuple[str, str]) -> None:
    """Put something else into a file, which must have had what it takes the place of."""
    text = file.read_text()
    for old, new in changes:
        assert old in text, f"{file.name} has no {old}"
        text = text.replace(old, new)
    file.write_text(text)


class Brokers:
    """Servers with the configuration as it stands, and the arguments of compose.yml; only addresses are the loopback's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._routes = dict(zip(BROKERS, _free_ports(3), strict=True))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports: dict[str, int] = {}
        self._monitors: dict[str, int] = {}

    def start(self, name: str, *changes: tuple[str, str]) -> None:
        """Start one, with *changes* to what it knows of the routes."""
        folder, is_ours = self._folder / name, name in BROKERS
        shutil.copytree(FOLDER, folder)
        [self.ports[name], self._monitors[name], route] = _free_ports(3)
        changed(
            folder / "nats.conf",
            ("0.0.0.0:4222", f"127.0.0.1:{self.ports[name]}"),
            ("0.0.0.0:6222", f"127.0.0.1:{self._routes[name] if is_ours else route}"),
        )
        with (folder / "nats.conf").open("a") as file:
            file.write(f'http: "127.0.0.1:{self._monitors[name]}"\n')
        there = [(f"{each}:6222", f"127.0.0.1:{port}") for each, port in self._routes.items()]
        changed(folder / "secrets" / "routes.conf", *there, *changes)
        options = " ".join(COMPOSE["n1"]["command"]).replace("n1", name)
        if is_ours:
            assert options == " ".join(COMPOSE[name]["command"])
        options = options.replace("/etc/nats/", f"{folder}/").replace("/data", f"{folder}/data")
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen([program(), *options.split()], stdout=log, stderr=log))

    def refused(self, name: str, by: str) -> bool:
        """Say whether a server has come to another one's port of routes, and was sent away."""
        lines = (self._folder / f"{name}.log").read_text().splitlines()
        return any(f":{self._routes[by]} " in line and "Authorization Violation" in line for line in lines)

    def peers(self, name: str) -> set[str]:
        """Return the names of those that it has routes to; of one that does not answer yet none."""
        try:
            found = httpx.get(f"http://127.0.0.1:{self._monitors[name]}/routez", timeout=5).json()
        except httpx.TransportError:
            return set()
        return {each["remote_name"] for each in found["routes"]}

    def end(self) -> None:
        """Kill all."""
        for process in self._processes:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    """Three that have routes to each other."""
    made = Brokers(tmp_path_factory.mktemp("brokers"))
    try:
        for name in BROKERS:
            made.start(name)
        for name in BROKERS:
            wait_until(lambda name=name: made.peers(name) == {*BROKERS} - {name}, f"{name} in the cluster")  # type: ignore[misc]
        yield made
    finally:
        made.end()


def test_the_brokers_configuration_makes_a_cluster(brokers: Brokers) -> None:
    """Three servers with the configuration as it stands take a stream of three replicas, and only from who may."""
    servers = ",".join(f"127.0.0.1:{brokers.ports[name]}" for name in BROKERS)
    assert len(make_stream(f"nats://tracker:example@{servers}/chat", 2)) == 2
    with pytest.raises(SinkFault) as refused:
        make_stream(f"nats://{servers}/chat", 2)
    assert refused.value.kind == "auth"


@pytest.mark.parametrize(
    ("name", "login"), [("stranger", ""), ("guesser", "broker:guessed@"), ("tracker", "tracker:example@")]
)
def test_nobody_else_becomes_a_broker(brokers: Brokers, name: str, login: str) -> None:
    """A server without the routes' password, one with a client's login among them, does not join the cluster."""
    brokers.start(name, (LOGIN, login), ('password: "example"', 'password: "its own"'))
    for each in BROKERS:
        wait_until(lambda each=each: brokers.refused(name, each), f"{each} to refuse it")  # type: ignore[misc]
    assert brokers.peers(name) == set()
    for each in BROKERS:
        assert brokers.peers(each) == {*BROKERS} - {each}


def test_an_acknowledgement_is_on_disks() -> None:
    """The brokers sync every write."""
    assert "\n  sync_interval: always\n" in (FOLDER / "nats.conf").read_text()


def _environment(document: Any) -> set[str]:
    """Return the names of the settings that a document gives."""
    if isinstance(document, dict):
        found = {name for name in document if isinstance(name, str) and name.startswith("TRACKER_")}
        name = document.get("name")
        found |= {name} if isinstance(name, str) and name.startswith("TRACKER_") else set()
        return found.union(*map(_environment, document.values()))
    return set().union(*map(_environment, document)) if isinstance(document, list) else set()


@pytest.mark.parametrize("name", ["compose.yml", "consumers.yaml"])
def test_settings(name: str) -> None:
    """Every TRACKER_ variable is a setting of the command line, or the file of one that is secret."""
    known = set(_variables(command_line).values())
    given = _environment(list(yaml.safe_load_all((FOLDER / name).read_text())))
    assert given
    assert {each.removesuffix("_FILE") for each in given} <= known


def test_what_the_brokers_include_is_mounted() -> None:
    """Each broker of compose.yml has the configuration, and the files that it includes."""
    included = re.findall(r'^\s*include "\./(.+)"$', (FOLDER / "nats.conf").read_text(), re.MULTILINE)
    assert len(included) == 2
    for name in BROKERS:
        mounts = COMPOSE[name]["volumes"]
        for file in ("nats.conf", *included):
            assert (FOLDER / file).is_file()
            assert f"../stream/{file}:/etc/nats/{file}:ro" in mounts


def test_only_brokers_reach_the_routes() -> None:
    """The policy lets whoever has a login come to the clients' port, and to that of the routes none but brokers."""
    [policy] = yaml.safe_load_all((FOLDER / "brokers.yaml").read_text())
    brokers = policy["spec"]["podSelector"]
    may = {port["port"]: rule.get("from") for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert brokers["matchLabels"]
    assert may == {4222: None, 6222: [{"podSelector": brokers}]}
