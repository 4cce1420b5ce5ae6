"""The chart's values: what cannot be right stops helm with a message that says so; what can, comes out as it was written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from tests.deploy.manifests import CHART, DEPLOY, documents, helmed, of_layer, only, pod_of, run, settings_of, workload
from tracker_daemon.cli import program

if TYPE_CHECKING:
    from pathlib import Path

SIDECAR = "mode=sidecar,chatServer.image=chat:1"


@pytest.mark.artefact("deploy/helm, values.schema.json", "helm")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("journal.sise=1Gi", "sise"),
        ("settings.FLUSH_INTERVALL=1", "FLUSH_INTERVALL"),
        ("settings.LOG_LEVEL=verbose", "settings/LOG_LEVEL"),
        ("settings.LOG_FORMAT=JSON", "settings/LOG_FORMAT"),
        ("mode=deamon", "mode"),
        ("port=0", "port"),
        ("image.digest=sha256:12", "digest"),
        (
            "terminationGracePeriod=65",
            "terminationGracePeriod, 65 s, must be longer than preStop, twice shutdownTimeout and linger: more than 65 s",
        ),
        ("mode=sidecar", "mode sidecar needs chatServer.image"),
        ("networkPolicy.clients.app=chat", "clients"),
        ("database.embedded=true,replicas=2", "replicas must be 1, not 2"),
        ("podMonitor.enabled=true,linger=15", "linger, 15 s, must be longer than podMonitor.interval, 15s"),
        ("podMonitor.enabled=true,podMonitor.interval=1m", "linger, 20 s, must be longer than podMonitor.interval, 1m"),
        ("podMonitor.enabled=true,podMonitor.interval=20000ms", "longer than podMonitor.interval, 20000ms"),
        ("podMonitor.enabled=true,podMonitor.interval=0s", "podMonitor/interval"),
        ("journal.size=1Gi", "journal.size, 1Gi, is too small for settings.JOURNAL_QUOTA, 1GiB"),
        (f"{SIDECAR},journal.size=1126Mi", "at least 1127Mi"),
        ("journal.size=3Gi,settings.JOURNAL_QUOTA=3GiB", "is too small for settings.JOURNAL_QUOTA, 3GiB"),
        ("journal.size=3G,settings.JOURNAL_QUOTA=3000000000", "is too small for settings.JOURNAL_QUOTA, 3000000000"),
        (
            "settings.JOURNAL_QUOTA=3Gi",
            'settings.JOURNAL_QUOTA must be bytes, or with KiB, MiB or GiB (64MiB), not "3Gi"',
        ),
        ("resources.limits.memory=512Mi", "memory, 512Mi, is too small for settings.MAX_PENDING, 1000000, of some 600"),
        ("settings.MAX_PENDING=2000000", "at least 1209Mi, or fewer"),
        ("podDisruptionBudget.maxUnavailable=0", "podDisruptionBudget.maxUnavailable, 0, would keep every node"),
        ("podDisruptionBudget.maxUnavailable=0%", "podDisruptionBudget.maxUnavailable, 0%, would keep every node"),
        ("podDisruptionBudget.maxUnavailable=2,replicas=2", "maxUnavailable, 2, would let all 2 replicas go at once"),
        (
            "podDisruptionBudget.maxUnavailable=67%,replicas=3",
            "maxUnavailable, 67%, would let all 3 replicas go at once",
        ),
        ("podDisruptionBudget.maxUnavailable=some", "podDisruptionBudget/maxUnavailable"),
    ],
)
def test_wrong_values(setting: str, message: str) -> None:
    """A misspelt or impossible value stops helm with a message that names it."""
    done = run(of_layer("helm"), "template", "chat", CHART, "--set", setting)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.artefact("deploy/helm, values.schema.json", "helm")
@pytest.mark.parametrize(
    "setting",
    [
        "podMonitor.enabled=true,podMonitor.interval=19999ms",
        "podMonitor.enabled=true,podMonitor.interval=1m,linger=61,terminationGracePeriod=200",
        "podMonitor.interval=5m",
        f"{SIDECAR},journal.size=1127Mi",
        "journal.size=3300M,settings.JOURNAL_QUOTA=3000000000",
        "journal.size=1.5Gi",
        "journal.size=128Mi,settings.JOURNAL_QUOTA=64 mib",
        "journal.size=1Mi,journal.enabled=false",
        "resources.limits.memory=637Mi",
        "resources.limits.memory=512M,settings.MAX_PENDING=500000",
        "resources.limits.memory=1209Mi,settings.MAX_PENDING=2000000",
        "resources.limits=null",
        "podDisruptionBudget.maxUnavailable=1,replicas=2",
        "podDisruptionBudget.maxUnavailable=66%,replicas=3",
        "podDisruptionBudget.maxUnavailable=100%,replicas=1",
        "podDisruptionBudget.maxUnavailable=1,replicas=0",
        "podDisruptionBudget.maxUnavailable=0,podDisruptionBudget.enabled=false",
    ],
)
def test_values_at_the_edge(setting: str) -> None:
    """What just fits, or is not used, stops nothing."""
    done = run(of_layer("helm"), "template", "chat", CHART, "--set", setting)
    assert done.returncode == 0, done.stderr


@pytest.mark.artefact("deploy/helm, values.schema.json", "jsonschema")
def test_schema_is_a_schema() -> None:
    """The chart's schema is valid itself, describes every value, those of a group too, and takes the defaults."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, group in schema["properties"].items():
        if name != "settings" and "properties" in group:
            assert set(values[name]) == set(group["properties"]), name
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: `make test-deploy` has it")
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(values)


@pytest.mark.artefact("deploy/helm, private-ca.yaml", "helm")
def test_numbers_and_files_of_the_host() -> None:
    """Whole numbers are written out; what is mounted for the database is mounted for the migration too."""
    found = documents(helmed("private-ca"))
    assert settings_of(found)["TRACKER_MAX_PENDING"] == "2000000"
    for pod in (pod_of(workload(found)), pod_of(only("Job", found))):
        assert pod is not None
        assert {"name": "database-ca", "configMap": {"name": "database-ca"}} in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "database-ca", "mountPath": "/etc/database", "readOnly": True} in container["volumeMounts"]


@pytest.mark.artefact("deploy/helm, journal.yaml", "helm")
def test_nodes_of_the_migration(tmp_path: Path) -> None:
    """Where every node wants a toleration, the migration has it too: else no install and no upgrade ends."""
    wanted = {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "dedicated", "operator": "Exists"}]}
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps(wanted))
    found = documents(helmed("journal", "--values", str(values)))
    for pod in (pod_of(workload(found)), pod_of(only("Job", found))):
        assert pod is not None
        assert {name: pod[name] for name in wanted} == wanted


@pytest.mark.artefact("deploy/helm, journal.yaml", "helm")
def test_small_numbers(tmp_path: Path) -> None:
    """However helm writes a number of a values file, 0.00001 as 1e-05, the daemon takes it."""
    values = tmp_path / "values.yaml"
    values.write_text("settings: {JOURNAL_SYNC: 0.00001, FLUSH_INTERVAL: 0.001, MAX_QUEUE_SIZE: 10000000}\n")
    settings = settings_of(documents(helmed("journal", "--values", str(values))))
    assert settings["TRACKER_JOURNAL_SYNC"] == "1e-05"
    given = {name: settings[name] for name in settings if name.split("_", 1)[1] in ("JOURNAL_SYNC", "FLUSH_INTERVAL")}
    given |= {
        "TRACKER_MAX_QUEUE_SIZE": settings["TRACKER_MAX_QUEUE_SIZE"],
        "TRACKER_JOURNAL": str(tmp_path / "journal"),
    }
    done = CliRunner().invoke(
        program,
        ["serve", "--check-config", "--database", "postgresql://db/chat", "--listen", f"unix:{tmp_path}/socket"],
        env=given,
    )
    assert done.exit_code == 0, done.output


@pytest.mark.artefact("deploy/helm, sidecar-without-journal.yaml", "helm")
def test_volumes_of_the_chat_server() -> None:
    """The chat server's volumes are in its pod, mounted by it alone."""
    pod = pod_of(workload(documents(helmed("sidecar-without-journal"))))
    assert pod is not None
    wanted = yaml.safe_load((DEPLOY / "helm/examples/sidecar-without-journal.yaml").read_text())["chatServer"]
    assert [volume for volume in pod["volumes"] if volume in wanted["volumes"]] == wanted["volumes"]
    (server,), (daemon,) = pod["containers"], pod["initContainers"]
    assert [mount for mount in server["volumeMounts"] if mount in wanted["volumeMounts"]] == wanted["volumeMounts"]
    assert "uploads" not in {mount["name"] for mount in daemon["volumeMounts"]}
