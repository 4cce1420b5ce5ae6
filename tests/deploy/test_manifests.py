"""Every manifest, rendered by the tool that it is for, is valid, and says what a pod of the daemon must."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import (
    CASES,
    CHART,
    DAEMONS,
    DEPLOY,
    OVERLAYS,
    RENDERED,
    ROOT,
    daemon_of,
    documents,
    each,
    helmed,
    kustomized,
    of_layer,
    only,
    pod_of,
    rendered,
    run,
    settings_of,
    tool,
    workload,
)

KUBERNETES = "1.35"


# -- by the tools ----------------------------------------------------------------------------------


@pytest.mark.artefact("Dockerfile", "hadolint")
def test_hadolint() -> None:
    """The Dockerfile has no fault that hadolint knows."""
    done = run(tool("hadolint"), "--failure-threshold", "style", ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.artefact("deploy/compose", "docker-compose")
def test_compose_config() -> None:
    """Compose takes its file, and warns of nothing."""
    done = run(tool("docker-compose"), "--file", DEPLOY / "compose/compose.yml", "config", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", each(RENDERED, "kubernetes-validate"))
def test_kubernetes_validate(name: str, tmp_path: Path) -> None:
    """Every manifest has the fields of its kind and no other; only the operator's two kinds are not known."""
    program = tool("kubernetes-validate")
    file = tmp_path / "all.yaml"
    file.write_text(rendered(name), encoding="utf-8")
    done = run(program, "-k", KUBERNETES, "--strict", file)
    assert done.returncode == 0, done.stdout + done.stderr
    unknown = re.findall(r"schema for kind (\w+)", done.stdout + done.stderr)
    assert set(unknown) <= {"PodMonitor", "PrometheusRule"}
    assert (done.stdout + done.stderr).count("passed for resource") == len(documents(rendered(name))) - len(unknown)


@pytest.mark.parametrize("case", each(CASES))
def test_helm_lint(case: str) -> None:
    """Helm finds no fault in the chart with the values of each case."""
    values = DEPLOY / "helm/examples" / f"{case}.yaml"
    done = run(of_layer("helm"), "lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.artefact("deploy/kubernetes", "kubectl")
def test_every_overlay() -> None:
    """Whatever kustomize can build is among what these tests look at, but for the base that the overlays have in them."""
    files = (DEPLOY / "kubernetes").rglob("kustomization.yaml")
    assert {str(file.parent.relative_to(DEPLOY / "kubernetes")) for file in files} == {"base", *OVERLAYS}


# -- what a pod must say ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(RENDERED))
def test_restricted(name: str) -> None:
    """Every pod meets the restricted standard, with a read-only root, no service-account token, and limits."""
    pods = [pod for pod in map(pod_of, documents(rendered(name))) if pod is not None]
    assert pods
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
        for volume in pod["volumes"]:
            assert "hostPath" not in volume


@pytest.mark.parametrize("name", each(DAEMONS))
def test_probes(name: str) -> None:
    """Three probes on the port that the daemon listens at; readiness asks the database only where calls need it."""
    found = documents(rendered(name))
    pod = pod_of(workload(found))
    assert pod is not None
    daemon = daemon_of(pod)
    (port,) = daemon["ports"]
    assert settings_of(found)["TRACKER_LISTEN"].split()[-1] == f"0.0.0.0:{port['containerPort']}"
    probes = {each: daemon[f"{each}Probe"]["httpGet"] for each in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {port["containerPort"]}
    sidecar = daemon["name"] in [container["name"] for container in pod.get("initContainers", [])]
    takes_calls = sidecar or "TRACKER_JOURNAL" in settings_of(found)
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/livez" if takes_calls else "/readyz"]


@pytest.mark.parametrize("name", each(DAEMONS))
def test_time_to_drain(name: str) -> None:
    """The grace period is longer than preStop, both parts of the drain, and the linger, which is longer than a scrape."""
    found = documents(rendered(name))
    pod = pod_of(workload(found))
    assert pod is not None
    drain = 2 * float(settings_of(found)["TRACKER_SHUTDOWN_TIMEOUT"])
    waits = [
        float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        for container in pod["containers"]
        if "lifecycle" in container
    ]
    assert waits
    linger = float(settings_of(found)["TRACKER_LINGER"])
    assert pod["terminationGracePeriodSeconds"] > drain + max(waits) + linger
    for document in found:
        if document["kind"] == "PodMonitor":
            (endpoint,) = document["spec"]["podMetricsEndpoints"]
            assert linger > float(endpoint["interval"].removesuffix("s"))


@pytest.mark.parametrize("name", each(DAEMONS))
def test_room_for_what_is_held(name: str) -> None:
    """The limit of memory has room for `MAX_PENDING` threads of 600 bytes: else the daemon is killed in an outage."""
    found = documents(rendered(name))
    pod = pod_of(workload(found))
    assert pod is not None
    limit = daemon_of(pod)["resources"]["limits"]["memory"]
    held = int(settings_of(found).get("TRACKER_MAX_PENDING", "1000000"))
    assert int(limit[:-2]) * {"Mi": 2**20, "Gi": 2**30}[limit[-2:]] >= 2**26 + 600 * held


@pytest.mark.parametrize("name", each(DAEMONS))
def test_secrets_are_files(name: str) -> None:
    """No secret is in the environment or in a ConfigMap; the files that the settings name are mounted."""
    found = documents(rendered(name))
    pod = pod_of(workload(found))
    assert pod is not None
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert not any("valueFrom" in variable for variable in container.get("env", []))
        assert not any("secretRef" in source for source in container.get("envFrom", []))
    settings = settings_of(found)
    assert ("TRACKER_DATABASE" in settings) == settings.get("TRACKER_DATABASE", "").startswith("embedded:")
    mounts = {mount["mountPath"] for mount in daemon_of(pod)["volumeMounts"]}
    assert mounts - {"/etc/database", "/var/lib/tracker"} == {"/run/tracker-daemon", "/etc/tracker-daemon"}
    for name_ in ("TRACKER_DATABASE_FILE", "TRACKER_TOKEN_FILE", "TRACKER_JOURNAL"):
        assert name_ not in settings or str(Path(settings[name_]).parent) in mounts


@pytest.mark.parametrize("name", each(DAEMONS))
def test_selectors_meet(name: str) -> None:
    """Service, disruption budget, network policy and monitor select the workload's pods."""
    found = documents(rendered(name))
    labels = workload(found)["spec"]["template"]["metadata"]["labels"].items()
    selectors = {
        "Service": lambda spec: spec["selector"],
        "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
        "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
        "PodMonitor": lambda spec: spec["selector"]["matchLabels"],
    }
    seen = set()
    for document in found:
        if document["kind"] in selectors:
            seen.add(document["kind"])
            assert selectors[document["kind"]](document["spec"]).items() <= labels
    assert "NetworkPolicy" in seen


@pytest.mark.parametrize("name", each(["overlays/standalone", "overlays/sidecar", "journal", "sidecar"]))
def test_everything_is_there(name: str) -> None:
    """The full cases have the budget, the policy, the monitor and the rules, and the rules are Prometheus' own."""
    found = documents(rendered(name))
    kinds = {document["kind"] for document in found}
    assert {"PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "PrometheusRule", "ServiceAccount"} <= kinds
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))
    assert only("PrometheusRule", found)["spec"] == rules


@pytest.mark.parametrize("name", each(["overlays/sidecar", "sidecar", "sidecar-without-journal"]))
def test_native_sidecar(name: str) -> None:
    """The sidecar is a restartable init container; the chat server shares its socket and has no more than the token."""
    pod = pod_of(workload(documents(rendered(name))))
    assert pod is not None
    (sidecar,), (server,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    assert {"mountPath": "/run/tracker-daemon", "name": mounts["/run/tracker-daemon"]} in sidecar["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "emptyDir" in volumes[mounts["/run/tracker-daemon"]]
    token = json.dumps(volumes[mounts["/etc/tracker-daemon"]])
    assert '"path": "token"' in token
    assert "database" not in token


@pytest.mark.artefact("deploy/helm, token.yaml", "helm")
def test_clients_of_the_policy() -> None:
    """Those of the values alone may send, and nobody if there are none; not the defaults as well."""

    def clients(*settings: str) -> list[dict[str, str]]:
        (rule,) = only("NetworkPolicy", documents(helmed("token", *settings)))["spec"]["ingress"]
        return [each["podSelector"]["matchLabels"] for each in rule["from"] if "podSelector" in each]

    assert clients() == [{"app.kubernetes.io/part-of": "chat"}]
    assert clients("--set-json", "networkPolicy.clients=[]") == []


@pytest.mark.parametrize("name", each(["overlays/standalone", "overlays/sidecar", "journal", "sidecar"]))
def test_nodes_can_be_drained(name: str) -> None:
    """Pods that are not ready, as while the database is away, hold no node up."""
    budget = only("PodDisruptionBudget", documents(rendered(name)))["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


@pytest.mark.parametrize("name", each(["migrate", "journal"]))
def test_the_migration_gives_up(name: str) -> None:
    """It waits five seconds for a lock, and less in all than helm does, five minutes; the logs of its tries stay."""
    job = only("Job", documents(rendered(name)))["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert {"name": "PGOPTIONS", "value": "-c lock_timeout=5s"} in container["env"]
    assert job["activeDeadlineSeconds"] < 300
    assert job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.artefact("deploy/helm, token.yaml", "helm")
def test_image_by_digest() -> None:
    """The image is by digest where the values have one."""
    pod = pod_of(workload(documents(helmed("token"))))
    assert pod is not None
    assert re.fullmatch(r"tracker-daemon@sha256:[0-9a-f]{64}", daemon_of(pod)["image"])


@pytest.mark.artefact("deploy/helm, journal.yaml", "helm")
@pytest.mark.artefact("deploy/kubernetes/overlays/standalone", "kubectl")
def test_config_checksum() -> None:
    """A changed setting makes new pods, with helm and with kustomize; an unchanged one does not."""

    def mark(*settings: str) -> str:
        template = workload(documents(helmed("journal", *settings)))["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert mark() == mark("--set", "replicas=3") != mark("--set", "settings.FLUSH_INTERVAL=1")
    found = documents(kustomized("overlays/standalone"))
    name = only("ConfigMap", found)["metadata"]["name"]
    assert re.fullmatch(r"tracker-daemon-[0-9a-z]{10}", name)
    pod = pod_of(workload(found))
    assert pod is not None
    assert daemon_of(pod)["envFrom"] == [{"configMapRef": {"name": name}}]
