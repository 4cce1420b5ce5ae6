"""The rendered manifests played as pods: what Kubernetes would start, starts."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.manifests import documents, helmed, kustomized, only, workload
from tests.deploy.podman import DAEMON, eventually
from tests.deploy.stack import Stack, stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.podman import Podman

pytestmark = pytest.mark.containers


@pytest.fixture(scope="module")
def system(podman: Podman, daemon_image: str, postgres_image: str) -> Iterator[Stack]:
    """A Postgres with the tables."""
    with stack(podman, daemon_image, postgres_image, "pods") as found:
        yield found


def playable(found: list[dict[str, Any]], secrets: Path, folder: Path) -> dict[str, Any]:
    """Return the workload's pod as podman 4.3 can play it; of the containers nothing is changed but what it cannot do.

    It knows no sidecars among init containers and no claims that a StatefulSet makes, takes no size for an emptyDir,
    and mounts a Secret's values without decoding them: they are files of *secrets*, put into *folder* as the Secret's
    volume would have them.
    """
    work = workload(found)
    template = work["spec"]["template"]
    spec = template["spec"]
    for container in spec.get("initContainers", []):
        assert container.pop("restartPolicy") == "Always"
    spec["containers"] = [*spec.pop("initContainers", []), *spec["containers"]]
    for claim in work["spec"].get("volumeClaimTemplates", []):
        spec["volumes"].append({"name": claim["metadata"]["name"], "emptyDir": {}})
    for number, volume in enumerate(spec["volumes"]):
        if "emptyDir" in volume:
            volume["emptyDir"] = {}
            continue
        sources = (
            [volume.pop("secret")] if "secret" in volume else [s["secret"] for s in volume.pop("projected")["sources"]]
        )
        mounted = folder / f"secret-{number}"
        mounted.mkdir()
        for source in sources:
            assert source.get("secretName", source.get("name")) == "tracker-daemon"
            for item in source.get("items", [{"key": name, "path": name} for name in ("database", "token")]):
                shutil.copy(secrets / item["key"], mounted / item["path"])
        volume["hostPath"] = {"path": str(mounted), "type": "Directory"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": work["metadata"]["name"], "labels": template["metadata"]["labels"]},
        "spec": spec,
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.artefact(path, tool, "podman", "runc"))
        for name, path, tool in (
            ("overlays/sidecar", "deploy/kubernetes/overlays/sidecar", "kubectl"),
            ("overlays/standalone", "deploy/kubernetes/overlays/standalone", "kubectl"),
            ("helm sidecar", "deploy/helm, sidecar.yaml", "helm"),
            ("helm journal", "deploy/helm, journal.yaml", "helm"),
        )
    ],
)
def test_pod(system: Stack, name: str, tmp_path: Path) -> None:
    """The pod starts with the manifest's own security, its daemon becomes ready, takes calls, and drains at the end."""
    podman, before = system.podman, system.turns()
    found = documents(helmed(name.split()[1]) if name.startswith("helm") else kustomized(name))
    pod = playable(found, system.secrets, tmp_path)
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump_all([only("ConfigMap", found), pod]), encoding="utf-8")
    daemon = f"{pod['metadata']['name']}-tracker-daemon"
    try:
        podman("play", "kube", "--network", system.network, file)
        eventually(lambda: podman.try_("exec", daemon, "tracker-daemon", "health").returncode == 0, "the daemon")
        state = podman.inspect(daemon)
        assert state["ImageName"] == DAEMON
        assert state["Config"]["User"].split(":")[0] == "10001"
        assert state["HostConfig"]["ReadonlyRootfs"] is True
        assert state["EffectiveCaps"] in (None, [])
        if len(pod["spec"]["containers"]) == 1:
            words = ("demo", "--daemon", "unix:/run/tracker-daemon/tracker.sock?token_file=/etc/tracker-daemon/token")
            podman(
                "exec", "--env", "TRACKER_LISTEN=", daemon, "tracker-daemon", *words, "--seconds", "1", "--rate", "500"
            )
        eventually(lambda: system.turns() > before + 100, "traffic")
        log = podman.log(daemon)
        podman("pod", "stop", "--time", "40", pod["metadata"]["name"])
        assert podman.inspect(daemon)["State"]["ExitCode"] == 0, podman.log(daemon)
        assert [json.loads(line)["level"] for line in log.splitlines() if line.startswith("{")].count("error") == 0
    finally:
        podman.try_("play", "kube", "--down", file)
