"""Who scrapes what in Kubernetes: every pod by one PodMonitor, under the job by which the alerts know it."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import (
    CASES,
    CONSUMERS,
    DAEMONS,
    DEPLOY,
    documents,
    each,
    helmed,
    pod_of,
    rendered,
    settings_of,
)


def monitored(name: str) -> list[dict[str, Any]]:
    """Return an overlay, or a case of the chart with its PodMonitor, which values may leave out."""
    return documents(helmed(name, "--set", "podMonitor.enabled=true") if name in CASES else rendered(name))


def selects(monitor: dict[str, Any], document: dict[str, Any]) -> bool:
    """Say whether a PodMonitor selects the pods that *document* makes."""
    selector = monitor["spec"]["selector"]
    assert set(selector) == {"matchLabels"}, "other selectors are not looked at here"
    return selector["matchLabels"].items() <= document["spec"]["template"]["metadata"]["labels"].items()


def jobs_of_the_alert() -> re.Pattern[str]:
    """Return which jobs TrackerAbsent looks at."""
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))
    (alert,) = [
        rule
        for rule in chain.from_iterable(group["rules"] for group in rules["groups"])
        if rule.get("alert") == "TrackerAbsent"
    ]
    (found,) = set(re.findall(r'up{job=~"([^"]+)"}', alert["expr"]))
    return re.compile(found)


@pytest.mark.parametrize("name", each(DAEMONS))
def test_who_is_scraped(name: str) -> None:
    """Daemons and consumers, side by side in a namespace, are scraped once each, and by the name of their own job."""
    found = [*monitored(name), *documents(rendered(CONSUMERS))]
    monitors = [document for document in found if document["kind"] == "PodMonitor"]
    alert, jobs = jobs_of_the_alert(), []
    for document in found:
        pod = pod_of(document)
        if pod is None or document["kind"] == "Job":
            continue
        ports = {
            port["name"]: port["containerPort"]
            for container in (*pod.get("initContainers", []), *pod["containers"])
            for port in container.get("ports", [])
        }
        (monitor,) = [monitor for monitor in monitors if selects(monitor, document)]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["path"] == "/metrics"
        assert ports[endpoint["port"]] == 8080
        (relabeling,) = endpoint["relabelings"]
        assert set(relabeling) == {"targetLabel", "replacement"}
        assert relabeling["targetLabel"] == "job"
        jobs.append(relabeling["replacement"])
    assert jobs == ["tracker-daemon", "tracker-consumer"]
    assert all(alert.fullmatch(job) for job in jobs)
    assert settings_of(found)["TRACKER_LISTEN"].endswith("0.0.0.0:8080")


@pytest.mark.parametrize("name", each(DAEMONS))
def test_no_migration_is_scraped(name: str) -> None:
    """A Job is over before a scrape, and its absence would be told."""
    found = [*monitored(name), *documents(rendered("migrate")), *documents(rendered("recover"))]
    jobs = [document for document in found if document["kind"] == "Job"]
    monitors = [document for document in found if document["kind"] == "PodMonitor"]
    assert len(jobs) >= 2
    assert not any(selects(monitor, job) for monitor in monitors for job in jobs)
