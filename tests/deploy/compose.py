"""Compose on podman's API: files of `deploy/` brought up as they stand, and taken down without a trace."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.deploy.manifests import DEPLOY, tool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.deploy.podman import Podman


class Compose:
    """A stack under compose, on podman's API."""

    def __init__(self, podman: Podman, url: str, project: str, files: Sequence[Path]) -> None:
        self.podman, self._url, self._project = podman, url, project
        self._command = [str(tool("docker-compose")), "--project-name", project]
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

    def name(self, service: str, number: int = 1) -> str:
        """Return a container of *service*."""
        return f"{self._project}-{service}-{number}"

    def address(self, service: str) -> str:
        """Return the address of the container of *service*."""
        return self.podman.address(self.name(service))

    def exit_code(self, service: str, number: int = 1) -> int:
        """Return with which status a container of *service* has ended."""
        state = self.podman.inspect(self.name(service, number))["State"]
        assert not state["Running"]
        return int(state["ExitCode"])

    def log(self, service: str, number: int = 1) -> str:
        """Return what a container of *service* wrote."""
        return self.podman.log(self.name(service, number))

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return what Prometheus answers."""
        url = f"http://{self.address('prometheus')}:9090/api/v1/query"
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


def images_of(file: Path) -> set[str]:
    """Return the images that the services of *file* name, as podman has them."""
    found = (service.get("image") for service in yaml.safe_load(file.read_text(encoding="utf-8"))["services"].values())
    names = (image for image in found if image)
    return {f"docker.io/{'' if '/' in image else 'library/'}{image}" for image in names}


def _quick(folder: Path, sooner: Mapping[str, str]) -> Path:
    """Return what is different in the tests: no ports of the machine, rules and scrapes that do not wait minutes."""
    rules = (DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8")
    for long, short in sooner.items():
        assert long in rules
        rules = rules.replace(long, short)
    config = (DEPLOY / "compose/prometheus.yml").read_text(encoding="utf-8")
    config, intervals = re.subn(r"_interval: \d+s", "_interval: 1s", config)
    assert intervals == 3, "of the scrapes, of the rules, and of the look for consumers"
    (folder / "rules.yml").write_text(rules, encoding="utf-8")
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
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


@contextmanager
def brought_up(
    podman: Podman, project: str, files: Sequence[Path], services: Sequence[str], sooner: Mapping[str, str]
) -> Iterator[Compose]:
    """Bring *services* of *files* up; all is down and without a trace at the end.

    Args:
        podman: with the images.
        project: the name of the stack.
        files: of `deploy/`, as they stand.
        services: those that there are images for; what they depend on comes with them.
        sooner: what in the rules of Prometheus waits too long for a test, and what is in its place.
    """
    folder = podman.folder / project
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with podman.engine() as url, podman.ticking():
        compose = Compose(podman, url, project, [*files, _quick(folder, sooner)])
        try:
            compose("up", "--detach", "--no-build", "--pull", "never", *services)
            yield compose
        finally:
            compose("down", "--volumes", "--timeout", "5")
    assert podman("ps", "--all", "--quiet", "--filter", f"name={project}") == ""
    assert podman("volume", "ls", "--quiet", "--filter", f"name={project}") == ""
