"""The rendered manifests played as pods: what Kubernetes would start, starts."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.manifests import documents, helmed, kustomized, only, workload
from tests.deploy.podman import DAEMON, eventually
from tests.deploy.stack import UID, Stack, stack

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


def playable(work: dict[str, Any], secrets: Path, folder: Path) -> dict[str, Any]:
    """Return the pod that *work* makes as podman 4.3 can play it; its containers are changed in what that cannot do alone.

    It knows no sidecars among init containers, no claims and no part of a volume, takes no size for an emptyDir, and
    mounts a Secret's values without decoding them: they are files of *secrets*, put into *folder* as the Secret's volume
    would have them. Claims are directories there too, so that the next pod finds what this one has left.
    """
    template = work["spec"]["template"]
    spec = template["spec"]
    for container in spec.get("initContainers", []):
        assert container.pop("restartPolicy") == "Always"
    spec["containers"] = [*spec.pop("initContainers", []), *spec["containers"]]
    for claim in work["spec"].get("volumeClaimTemplates", []):
        spec["volumes"].append({"name": claim["metadata"]["name"], **directory(folder / "claim")})
    for container in spec["containers"]:
        for mount in container["volumeMounts"]:
            if part := mount.pop("subPath", None):
                mount["name"] = f"{mount['name']}-{part}"
                spec["volumes"].append({"name": mount["name"], **directory(folder / "claim" / part)})
    for number, volume in enumerate(spec["volumes"]):
        if "emptyDir" in volume:
            volume["emptyDir"] = {}
        elif volume.pop("persistentVolumeClaim", None):
            volume.update(directory(folder / "claim"))
        elif "hostPath" not in volume:
            volume.update(files_of(volume, secrets, folder / f"secret-{number}"))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": work["metadata"]["name"], "labels": template["metadata"]["labels"]},
        "spec": spec,
    }


def directory(path: Path) -> dict[str, Any]:
    """Return a volume that is *path*, which belongs to the pod's user as by fsGroup."""
    path.mkdir(exist_ok=True)
    os.chown(path, UID, UID)
    return {"hostPath": {"path": str(path), "type": "Directory"}}


def files_of(volume: dict[str, Any], secrets: Path, folder: Path) -> dict[str, Any]:
    """Take what the volume has of Secrets out of it; return the same as a directory."""
    sources = (
        [volume.pop("secret")] if "secret" in volume else [s["secret"] for s in volume.pop("projected")["sources"]]
    )
    folder.mkdir(exist_ok=True)
    for source in sources:
        assert source.get("secretName", source.get("name")) == "tracker-daemon"
        for item in source.get("items", [{"key": name, "path": name} for name in ("database", "token")]):
            shutil.copy(secrets / item["key"], folder / item["path"])
    return {"hostPath": {"path": str(folder), "type": "Directory"}}


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
    pod = playable(workload(found), system.secrets, tmp_path)
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


# In the chat server: fifty turns of its own tracker, with a journal, and fifty by POST to the daemon beside it.
CALLS = """
import http.client
from tracker_daemon import Tracker
url = "unix:/run/tracker-daemon/tracker.sock?token_file=/etc/tracker-daemon/token"
tracker = Tracker(url, journal="/var/lib/tracker/journal", shutdown_timeout=1)
for _ in range(50):
    assert tracker.record_turn("by-tracker")
asking = http.client.HTTPConnection("127.0.0.1", 8080)
bearer = open("/etc/tracker-daemon/token").read().strip()
line = '{"call": "record_turn", "thread_id": "by-post"}\\n'
asking.request("POST", "/v1/calls", line * 50, {"Authorization": f"Bearer {bearer}"})
print(asking.getresponse().status, tracker.close().journaled)
"""
# The chat server when it is there again.
AGAIN = """
from tracker_daemon import Tracker
url = "unix:/run/tracker-daemon/tracker.sock?token_file=/etc/tracker-daemon/token"
with Tracker(url, journal="/var/lib/tracker/journal") as tracker:
    tracker.flush(60)
"""


@pytest.mark.artefact("deploy/kubernetes/overlays/sidecar", "kubectl", "podman", "runc")
@pytest.mark.artefact("deploy/kubernetes/recover", "kubectl", "podman", "runc")
@pytest.mark.parametrize("by", ["the pod that comes back", "the Job"])
def test_what_a_pod_leaves_on_its_claim(system: Stack, by: str, tmp_path: Path) -> None:
    """A sidecar's pod is deleted while the database is away: what is on its claim is applied later, each call once."""
    podman = system.podman
    found, file = documents(kustomized("overlays/sidecar")), tmp_path / "pod.yaml"
    only("ConfigMap", found)["data"] |= {"TRACKER_SHUTDOWN_TIMEOUT": "1", "TRACKER_LINGER": "0"}
    pod = playable(workload(found), system.secrets, tmp_path)
    file.write_text(yaml.safe_dump_all([only("ConfigMap", found), pod]), encoding="utf-8")
    server, daemon = "chat-server-chat-server", "chat-server-tracker-daemon"
    system.sql("DELETE FROM conversations WHERE thread_id LIKE 'by-%'")

    def play() -> None:
        podman("play", "kube", "--network", system.network, file)
        eventually(lambda: podman.try_("exec", daemon, "tracker-daemon", "health").returncode == 0, "the daemon")

    def turns() -> str:
        return system.sql("SELECT thread_id, turn_count FROM conversations WHERE thread_id LIKE 'by-%' ORDER BY 1")

    try:
        play()
        podman("stop", "--time", "20", system.postgres)
        try:
            assert podman("exec", server, "python", "-c", CALLS) == "202 50"
            podman("pod", "stop", "--time", "40", "chat-server")
            assert podman.inspect(daemon)["State"]["ExitCode"] == 0, podman.log(daemon)
            podman("play", "kube", "--down", file)
        finally:
            podman("start", system.postgres)
        eventually(lambda: podman.try_("exec", system.postgres, "pg_isready").returncode == 0, "Postgres")
        assert turns() == ""
        if by == "the Job":
            for journal in ("/var/lib/tracker/journal", "/var/lib/tracker/chat-server/journal"):
                recover(system, journal, tmp_path)
        else:
            play()
            podman("exec", server, "python", "-c", AGAIN)
        eventually(lambda: turns() == "by-post|50\nby-tracker|50", "what was left")
    finally:
        podman.try_("play", "kube", "--down", file)


def recover(system: Stack, journal: str, folder: Path) -> None:
    """Run the Job of deploy/kubernetes/recover on the claim in *folder*, to its end."""
    podman, file = system.podman, folder / "recover.yaml"
    pod = playable(only("Job", documents(kustomized("recover"))), system.secrets, folder)
    (container,) = pod["spec"]["containers"]
    container["args"][-1] = journal
    file.write_text(yaml.safe_dump(pod), encoding="utf-8")
    name = "tracker-daemon-recover-recover"
    try:
        podman("play", "kube", "--network", system.network, file)
        assert podman("wait", name) == "0", podman.log(name)
    finally:
        podman.try_("play", "kube", "--down", file)
