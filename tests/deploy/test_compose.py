"""compose.yml brought up as it stands: traffic in the table, numbers in Prometheus, an alert when the database stops."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.deploy.manifests import DEPLOY, tool
from tests.deploy.podman import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.podman import Podman

pytestmark = [
    pytest.mark.containers,
    pytest.mark.artefact("deploy/compose", "docker-compose", "podman", "runc", "prometheus"),
]

PROJECT = "trackertest"
# All but Grafana, of which there is nothing to stand in.
JOBS = {"tracker-daemon", "chat-server"}
SERVICES = ("postgres", "migrate", "daemon", "traffic", "prometheus")
# The alert of a database that is away waits two minutes; here some seconds.
SOONER = {
    "instance:tracker_pending_age:seconds > 60\n        for: 1m": "instance:tracker_pending_age:seconds > 4\n        for: 2s"
}


class Compose:
    """The stack under compose, on podman's API."""

    def __init__(self, podman: Podman, url: str, files: list[Path]) -> None:
        self.podman, self._url = podman, url
        self._command = [str(tool("docker-compose")), "--project-name", PROJECT]
        for file in files:
            self._command += ["--file", str(file)]

    def __call__(self, *words: str) -> str:
        """Run compose, which must succeed."""
        done = subprocess.run(
            [*self._command, *words],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env={**self.podman.environment, "DOCKER_HOST": self._url, "DOCKER_BUILDKIT": "0"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def name(self, service: str) -> str:
        """Return the container of *service*."""
        return f"{PROJECT}-{service}-1"

    def turns(self) -> int:
        """Return how many turns the table shows."""
        statement = "SELECT coalesce(sum(turn_count), 0) FROM conversations"
        words = ("exec", self.name("postgres"), "psql", "-U", "chat", "-d", "chat", "-At", "-c", statement)
        return int(self.podman(*words))

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return what Prometheus answers."""
        url = f"http://{self.podman.address(self.name('prometheus'))}:9090/api/v1/query"
        try:
            answer = httpx.get(url, params={"query": query}, trust_env=False)
        except httpx.HTTPError:
            return []
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def value(self, query: str) -> float:
        """Return the one value of *query*; 0 if there is none."""
        found = self.ask(query)
        return float(found[0]["value"][1]) if found else 0.0


def quick(folder: Path) -> Path:
    """Return what is different in the test: no ports of the machine, rules and scrapes that do not wait minutes."""
    rules = (DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8")
    for long, short in SOONER.items():
        assert long in rules
        rules = rules.replace(long, short)
    config = (DEPLOY / "compose/prometheus.yml").read_text(encoding="utf-8")
    assert config.count("_interval: 5s") == 2
    (folder / "rules.yml").write_text(rules, encoding="utf-8")
    (folder / "prometheus.yml").write_text(config.replace("_interval: 5s", "_interval: 1s"), encoding="utf-8")
    override = folder / "override.yml"
    override.write_text(
        f"""\
services:
  daemon:
    ports: !reset []
  prometheus:
    ports: !reset []
    volumes:
      - {folder}/prometheus.yml:/etc/prometheus/prometheus.yml:ro
      - {folder}/rules.yml:/etc/prometheus/rules.yml:ro
  grafana:
    ports: !reset []
""",
        encoding="utf-8",
    )
    return override


@pytest.fixture(scope="module")
def compose(podman: Podman, daemon_image: str, postgres_image: str, prometheus_image: str) -> Iterator[Compose]:
    """The stack, up; down and without a trace at the end."""
    file = DEPLOY / "compose/compose.yml"
    images = {service["image"] for service in yaml.safe_load(file.read_text(encoding="utf-8"))["services"].values()}
    assert {image.split("/", 1)[1].removeprefix("library/") for image in (daemon_image, postgres_image)} <= images
    assert prometheus_image.removeprefix("docker.io/") in images
    folder = podman.folder / "compose"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with podman.engine() as url, podman.ticking():
        compose = Compose(podman, url, [file, quick(folder)])
        try:
            compose("up", "--detach", "--no-build", "--pull", "never", *SERVICES)
            yield compose
        finally:
            compose("down", "--volumes", "--timeout", "5")
    assert podman("ps", "--all", "--quiet", "--filter", f"name={PROJECT}") == ""
    assert podman("volume", "ls", "--quiet", "--filter", f"name={PROJECT}") == ""


def test_traffic_reaches_the_table(compose: Compose) -> None:
    """After `up` the table is made, and the traffic's turns appear in it, more and more."""
    assert compose.podman.inspect(compose.name("migrate"))["State"]["ExitCode"] == 0
    eventually(lambda: compose.turns() > 0, "traffic")
    seen = compose.turns()
    eventually(lambda: compose.turns() > seen + 200, "more traffic")


def test_recording_rules(compose: Compose) -> None:
    """The shipped rules are loaded, without a fault, and their recordings have the traffic's rate as value."""
    # A rate over five minutes, of which the first seconds are known.
    rate = 'instance:tracker_calls_applied:rate5m{job="tracker-daemon"}'
    eventually(lambda: compose.value(rate) > 5, "the recorded rate")
    eventually(
        lambda: compose.ask('instance:tracker_commit_lag_seconds:p99_rate5m{job="tracker-daemon"}'), "the recorded lag"
    )
    assert compose.value("sum(up)") == 2
    assert compose.value("sum(prometheus_rule_evaluation_failures_total)") == 0


def test_alert_when_the_database_stops(compose: Compose) -> None:
    """The alert fires, for the chat server and the daemon, while the database is stopped; nothing is lost by that."""
    firing = 'ALERTS{alertname="TrackerFlushStalled", alertstate="firing"}'
    assert compose.ask(firing) == []
    compose("stop", "postgres")
    eventually(lambda: {each["metric"]["job"] for each in compose.ask(firing)} == JOBS, "the alert for both")
    compose("start", "postgres")
    eventually(lambda: not compose.ask(firing), "the end of the alert")
    assert compose.value("sum(tracker_calls_lost_total)") == 0


def test_ends(compose: Compose) -> None:
    """`stop` ends traffic and daemon with status 0, and every call that was made is in the table."""
    compose("stop", "traffic")
    state, log = compose.podman.inspect(compose.name("traffic"))["State"], compose.podman.log(compose.name("traffic"))
    assert state["ExitCode"] == 0, log
    assert re.search(r"^APPLIED  [\d,]+ calls on \d+ conversations; 0 refused, set aside or lost$", log, re.MULTILINE)
    compose("stop", "daemon")
    assert compose.podman.inspect(compose.name("daemon"))["State"]["ExitCode"] == 0
