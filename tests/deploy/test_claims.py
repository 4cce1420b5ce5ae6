"""A journal outlives its pod: it stands on a claim of the replica's own, in every overlay, case and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests import (
    CASES,
    DAEMONS,
    daemon_of,
    documents,
    each,
    helmed,
    only,
    pod_of,
    rendered,
    settings_of,
    workload,
)
from tracker_daemon.options import Size

UNITS = {"Mi": 20, "Gi": 30}


def check(found: list[dict[str, Any]]) -> bool:
    """Say whether there is a journal; if so its claim is as it must be, else there is none."""
    settings, work = settings_of(found), workload(found)
    pod = pod_of(work)
    assert pod is not None
    mounts = {mount["mountPath"]: mount["name"] for mount in daemon_of(pod)["volumeMounts"]}
    in_the_pod = {volume["name"] for volume in pod["volumes"]}
    if "TRACKER_JOURNAL" not in settings:
        assert work["kind"] == "Deployment"
        assert "volumeClaimTemplates" not in work["spec"]
        assert ("/var/lib/tracker" in mounts) == settings.get("TRACKER_DATABASE", "").startswith("embedded:")
        return False
    assert work["kind"] == "StatefulSet"
    (claim,) = work["spec"]["volumeClaimTemplates"]
    volume = mounts[str(Path(settings["TRACKER_JOURNAL"]).parent)]
    assert volume == claim["metadata"]["name"]
    assert volume not in in_the_pod, "else the volume would stand in the claim's place"
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    size = claim["spec"]["resources"]["requests"]["storage"]
    quota = Size().convert(settings.get("TRACKER_JOURNAL_QUOTA", "1GiB"), None, None)
    assert int(size[:-2]) << UNITS[size[-2:]] >= 1.1 * quota
    assert work["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    # Drained one by one, but started at once: none waits for another's database.
    assert work["spec"]["podManagementPolicy"] == "Parallel"
    governing = [
        document
        for document in found
        if document["kind"] == "Service" and document["metadata"]["name"] == work["spec"]["serviceName"]
    ]
    assert [(service["spec"]["clusterIP"], service["spec"]["selector"]) for service in governing] == [
        ("None", work["spec"]["selector"]["matchLabels"])
    ]
    return True


@pytest.mark.parametrize("name", each(DAEMONS))
def test_no_journal_goes_with_its_pod(name: str) -> None:
    """A journal is on a claim that stays, larger than its quota; without one there is a Deployment and no claim."""
    assert check(documents(rendered(name))) == (name not in ("token", "sidecar-without-journal"))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", each(CASES))
def test_in_either_mode(name: str, *, enabled: bool) -> None:
    """The chart does so for every case with a journal, and with none."""
    assert check(documents(helmed(name, "--set", f"journal.enabled={str(enabled).lower()}"))) == enabled


@pytest.mark.parametrize("name", each(["overlays/sidecar", "sidecar"]))
def test_the_chat_servers_own_journal(name: str) -> None:
    """The sidecar's chat server has the claim too, in a directory where the daemon's journal is not."""
    found = documents(rendered(name))
    pod = pod_of(workload(found))
    assert pod is not None
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "journal"]
    assert mount == {"name": "journal", "mountPath": "/var/lib/tracker", "subPath": "chat-server"}
    assert settings_of(found)["TRACKER_JOURNAL"] != f"/var/lib/tracker/{mount['subPath']}"


@pytest.mark.parametrize("name", each(["recover"]))
def test_recovery_of_a_claim(name: str) -> None:
    """The Job that applies what a replica left takes a claim of the sidecar's, where the daemon has its journal."""
    (pod,) = [pod for pod in map(pod_of, documents(rendered(name))) if pod is not None]
    sidecar = documents(rendered("overlays/sidecar"))
    work = workload(sidecar)
    names = [f"journal-{work['metadata']['name']}-{ordinal}" for ordinal in range(work["spec"]["replicas"])]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mounts["/var/lib/tracker"]]
    assert volume["persistentVolumeClaim"]["claimName"] == names[-1], "a scale-down takes the highest ordinal"
    assert container["args"] == ["journal", "recover", settings_of(sidecar)["TRACKER_JOURNAL"]]
    owner = only("StatefulSet", sidecar)["spec"]["template"]["spec"]["securityContext"]
    assert pod["securityContext"] == owner
